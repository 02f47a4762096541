"""Refit and router repair against brute-force least squares."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.compression.apply import apply_plan, router_rows
from lightning_smoe.compression.record import (
    bias_output,
    output_features,
    output_weights,
)
from lightning_smoe.functional.refit import Refit, log_sum_exp_targets
from lightning_smoe.functional.router import LogSumExp, MeanRows
from lightning_smoe.models.layer import find_moe_layers
from tests.calibration.batches import random_windows
from tests.compression.plans import MANY, MERGED, blocks_of, compressed, copy_expert, plan_for
from tests.families import build


class Fit:
    """The least-squares problem of one layer: pruned model against original, in float64.

    Args:
        pruned: The model before its layer is refitted, which gives features and start weights.
        original: The model whose block outputs are wanted.
        index: Number of the block.
        strength: Of the refit.
    """

    def __init__(
        self, pruned: PreTrainedModel, original: PreTrainedModel, index: int, strength: float
    ) -> None:
        layer, block = blocks_of(pruned, index)
        self.features = output_features(layer, block).values.detach().double()
        self.start = output_weights(layer).detach().double()
        target = blocks_of(original, index)[1].output.double()
        self.target = target - bias_output(layer, block).detach().double()
        energy = self.features.square().sum(0)
        self.lam = strength * energy[energy > 0].mean()

    def solution(self) -> Tensor:
        """Least squares with the start weights as extra tokens."""
        extra = self.lam.sqrt() * torch.eye(len(self.start.T), dtype=torch.float64)
        matrix = torch.cat([self.features, extra])
        target = torch.cat([self.target, extra @ self.start.T])
        weights: Tensor = torch.linalg.lstsq(matrix, target).solution.T
        return weights

    def objective(self, weights: Tensor) -> float:
        """Squared error plus the shrinkage."""
        error = (self.features @ weights.double().T - self.target).square().sum()
        return float(error + self.lam * (weights.double() - self.start).square().sum())


@pytest.mark.parametrize("family", MANY)
@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_the_refit_is_least_squares_on_the_calibration_tokens(family: str, strength: float) -> None:
    original = build(family)
    first = find_moe_layers(original)[:1]
    fit = Fit(compressed(build(family), plan_for(first)), original, 0, strength)
    refitted = compressed(build(family), plan_for(first, refit=Refit(strength)))
    weights = output_weights(find_moe_layers(refitted)[0]).detach().double()
    expected = fit.solution()
    error = (weights - expected).norm() / (expected - fit.start).norm()
    assert error < 1e-4


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("strength", [1e-4, 0.1, 10.0])
def test_the_refit_never_raises_its_objective(family: str, strength: float) -> None:
    original = build(family)
    first = find_moe_layers(original)[:1]
    fit = Fit(compressed(build(family), plan_for(first, MERGED)), original, 0, strength)
    refitted = compressed(build(family), plan_for(first, MERGED, refit=Refit(strength)))
    weights = output_weights(find_moe_layers(refitted)[0]).detach()
    # Weights are stored in float32.
    assert fit.objective(weights) <= fit.objective(fit.start) * (1 + 1e-6)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_later_layers_are_fitted_under_the_inputs_that_the_compressed_model_gives(
    family: str,
) -> None:
    original = build(family)
    layers = find_moe_layers(original)
    both = compressed(build(family), plan_for(layers, refit=Refit()))
    # By hand: the first layer is compressed and refitted, the second only pruned.
    before = compressed(build(family), plan_for(layers[:1], refit=Refit()))
    apply_plan(before, plan_for(layers[1:]))
    fit = Fit(before, original, 1, Refit().strength)
    weights = output_weights(find_moe_layers(both)[1]).detach().double()
    expected = fit.solution()
    assert (weights - expected).norm() / (expected - fit.start).norm() < 1e-4
    # Under the original's inputs it would be another fit.
    pruned = compressed(build(family), plan_for(layers[1:]))
    other = Fit(pruned, original, 1, Refit().strength).solution()
    assert (weights - other).norm() / (other - fit.start).norm() > 1e-2


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_log_sum_exp_rows_are_fitted_under_the_compressed_models_inputs(family: str) -> None:
    layers = find_moe_layers(build(family))
    repair = LogSumExp(0.01)
    both = compressed(build(family), plan_for(layers, MERGED, router=repair))
    # By hand: the first layer is compressed, the second is the original's.
    before = compressed(build(family), plan_for(layers[:1], MERGED, router=repair))
    layer, block = blocks_of(before, 1)
    rows = router_rows(layer)
    assignment = torch.zeros(12, dtype=torch.int64)
    for slot, group in enumerate(MERGED):
        assignment[group] = slot
    targets = log_sum_exp_targets(block.tokens.router_logits, assignment, 8).double()
    features = block.tokens.states.double()
    start = torch.stack([rows.weight[group].mean(0) for group in MERGED]).detach().double()
    if rows.bias is not None:
        features = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
        bias = torch.stack([rows.bias[group].mean() for group in MERGED]).detach().double()
        start = torch.cat([start, bias[:, None]], dim=1)
    lam = repair.strength * features.square().sum(0).mean()
    extra = lam.sqrt() * torch.eye(features.shape[1], dtype=torch.float64)
    expected = torch.linalg.lstsq(
        torch.cat([features, extra]), torch.cat([targets, extra @ start.T])
    ).solution.T
    found = router_rows(find_moe_layers(both)[1])
    for slot, group in enumerate(MERGED):
        if len(group) > 1:
            wanted = expected[slot, :32].float()
            torch.testing.assert_close(found.weight[slot].detach(), wanted, rtol=1e-3, atol=1e-4)
            if found.bias is not None:
                assert found.bias[slot].item() == pytest.approx(expected[slot, 32].item(), abs=1e-3)
        else:
            assert torch.equal(found.weight[slot], rows.weight[group[0]])


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss", "granitemoe"]
)
def test_merging_equal_experts_with_log_sum_exp_keeps_the_logits(family: str) -> None:
    # Eleven of twelve are selected and the routers are so sharp that the twelfth has no weight:
    # two equal experts are both selected before, and their slot has both their weights after.
    original = build(family)
    groups = [[0], [1, 4], [2], [3], [5], [6], [7], [8], [9], [10], [11]]
    for layer in find_moe_layers(original):
        copy_expert(layer, 1, 4)
        owner = layer.router if hasattr(layer.router, "top_k") else layer.block
        owner.top_k = 11
        with torch.no_grad():
            layer.router_tensors[0].rows.mul_(4)
    # No more tokens than the width of the states: a row without a bias can give their logits.
    windows = random_windows(4)
    assert windows.num_tokens < 32
    plan = plan_for(find_moe_layers(original), groups, router=LogSumExp(1e-6))
    model = compressed(copy.deepcopy(original), plan, windows)
    inputs = {"input_ids": windows.input_ids, "attention_mask": windows.attention_mask}
    real = windows.attention_mask.bool()
    with torch.no_grad():
        before, after = original(**inputs).logits[real], model(**inputs).logits[real]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))
    # Rows averaged without the log of two lose half of the slot's weight.
    naive = copy.deepcopy(original)
    apply_plan(naive, plan_for(find_moe_layers(original), groups, router=MeanRows()))
    with torch.no_grad():
        wrong = naive(**inputs).logits[real]
    assert (wrong - before).norm() > 100 * (after - before).norm()
