"""Refit and router repair against brute-force least squares."""

import copy
from typing import Any

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
from lightning_smoe.models.walk import decoder_layers
from tests.calibration.batches import random_windows
from tests.compression.plans import (
    MANY,
    MERGED,
    blocks_of,
    compressed,
    copy_expert,
    plan_for,
    refitted,
)
from tests.families import build

# More tokens than features, or a fit would not help the sequences that are held out.
TEXT = random_windows(110)


@torch.no_grad()
def states_after(model: PreTrainedModel, index: int) -> Tensor:
    """Hidden states of the calibration tokens behind one decoder layer."""
    found: list[Tensor] = []

    def note(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hook = decoder_layers(model)[index].register_forward_hook(note)
    mask = TEXT.attention_mask
    model.base_model(TEXT.input_ids, attention_mask=mask, use_cache=False)
    hook.remove()
    return found[0][mask.bool()]


class Fit:
    """The least-squares problem of one layer: pruned model against original, in float64.

    Args:
        pruned: The model before its layer is refitted, which gives features and start weights.
        original: The model whose block outputs, or whose residual stream, is wanted.
        index: Number of the block.
        refit: Its settings.
    """

    def __init__(
        self, pruned: PreTrainedModel, original: PreTrainedModel, index: int, refit: Refit
    ) -> None:
        layer, block = blocks_of(pruned, index, TEXT)
        self.features = output_features(layer, block).values.detach().double()
        self.start = output_weights(layer).detach().double()
        target = blocks_of(original, index, TEXT)[1].output.double()
        if refit.correct_drift:
            stream = (states_after(model, layer.index).double() for model in (original, pruned))
            decoder = decoder_layers(pruned)[layer.index]
            factor = getattr(decoder, "residual_multiplier", 1.0)
            wanted, found = stream
            target = block.output.double() + (wanted - found) / factor
        self.target = target - bias_output(layer, block).detach().double()
        energy = self.features.square().sum(0)
        assert refit.strength is not None
        self.lam = refit.strength * energy[energy > 0].mean()

    def solution(self) -> Tensor:
        """Least squares with the start weights as extra tokens."""
        extra = self.lam.sqrt() * torch.eye(len(self.start.T), dtype=torch.float64)
        matrix = torch.cat([self.features, extra])
        target = torch.cat([self.target, extra @ self.start.T])
        weights: Tensor = torch.linalg.lstsq(matrix, target).solution.T
        return weights

    def distance(self, model: PreTrainedModel, index: int) -> float:
        """Of a model's weights from the solution, relative to what the fit changes."""
        weights = output_weights(find_moe_layers(model)[index]).detach().double()
        expected = self.solution()
        return float((weights - expected).norm() / (expected - self.start).norm())


@pytest.mark.parametrize("family", [*MANY, "granitemoe"])
@pytest.mark.parametrize("drift", [False, True], ids=["block", "stream"])
def test_the_refit_is_least_squares_on_the_calibration_tokens(family: str, drift: bool) -> None:
    refit, original = Refit(0.3, correct_drift=drift), build(family)
    first = find_moe_layers(original)[:1]
    fit = Fit(compressed(build(family), plan_for(first), TEXT), original, 0, refit)
    model, outcomes = refitted(build(family), plan_for(first, refit=refit), TEXT)
    assert [outcome.applied for outcome in outcomes.values()] == [True]
    assert fit.distance(model, 0) < 2e-4


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
@pytest.mark.parametrize("drift", [False, True], ids=["block", "stream"])
def test_later_layers_are_fitted_under_the_inputs_that_the_compressed_model_gives(
    family: str, drift: bool
) -> None:
    refit, original = Refit(0.3, correct_drift=drift), several(family)
    layers = find_moe_layers(original)
    both, outcomes = refitted(several(family), plan_for(layers, refit=refit), TEXT)
    assert [outcome.applied for outcome in outcomes.values()] == [True, True]
    # By hand: the first layer is compressed and refitted, the second only pruned.
    before, _ = refitted(several(family), plan_for(layers[:1], refit=refit), TEXT)
    apply_plan(before, plan_for(layers[1:]))
    assert Fit(before, original, 1, refit).distance(both, 1) < 2e-4
    # Under the original's inputs, or for another target, it would be another fit.
    pruned = compressed(several(family), plan_for(layers[1:]), TEXT)
    assert Fit(pruned, original, 1, refit).distance(both, 1) > 1e-2
    other = Refit(0.3, correct_drift=not drift)
    assert Fit(before, original, 1, other).distance(both, 1) > 1e-2


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_correcting_drift_brings_the_residual_stream_nearer_to_the_originals(family: str) -> None:
    original, errors = several(family), []
    layers = find_moe_layers(original)
    wanted = states_after(original, layers[1].index)
    for drift in (False, True):
        plan = plan_for(layers, refit=Refit(0.3, correct_drift=drift))
        model, _ = refitted(several(family), plan, TEXT)
        errors.append((states_after(model, layers[1].index) - wanted).square().mean())
    assert errors[1] < 0.99 * errors[0]


def several(family: str) -> PreTrainedModel:
    """A model of a family; a Granite multiplies what its layers add."""
    model = build(family)
    if family == "granitemoe":
        decoder: Any
        for decoder in decoder_layers(model):
            decoder.residual_multiplier = 0.5
    return model


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
