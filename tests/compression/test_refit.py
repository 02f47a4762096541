"""The refit of one layer, in one system of equations and expert by expert."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_smoe.calibration.observer import RoutedTokens
from lightning_smoe.compression import refit
from lightning_smoe.compression.record import (
    BlockRecord,
    bias_output,
    output_features,
    output_weights,
)
from lightning_smoe.compression.refit import Record, refit_by_sweeps, refit_jointly
from lightning_smoe.models.layer import MoELayer
from tests.compression.plans import MANY, blocks_of
from tests.families import build

Fitter = Callable[..., Any]
FITTERS = [refit_jointly, refit_by_sweeps]
FAMILIES = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"]


def same(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


def some(block: BlockRecord, rows: Tensor) -> BlockRecord:
    """What a block did with some of its tokens."""
    tokens = block.tokens
    return BlockRecord(
        RoutedTokens(
            tokens.states[rows],
            tokens.router_logits[rows],
            tokens.routing_weights[rows],
            tokens.expert_indices[rows],
            tokens.domain[rows],
            None,
        ),
        None if block.shared is None else block.shared[rows],
        block.output[rows],
    )


class Problem:
    """A layer that is to give the outputs of another model's layer.

    Args:
        family: Of both models.
    """

    def __init__(self, family: str) -> None:
        layer, block = blocks_of(build(family), 0)
        wanted = blocks_of(build(family, seed=9), 0)[1].output - bias_output(layer, block).detach()
        self.layer: MoELayer = layer
        self.records: list[Record] = [(block, wanted)]
        self.start = output_weights(layer).detach()
        self.features = output_features(layer, block).values.detach().double()
        self.target = wanted.double()
        energy = self.features.square().sum(0)
        self.energy = energy[energy > 0].mean()

    def solve(self, fitter: Fitter, strength: float) -> tuple[Tensor, tuple[float, float]]:
        weights, errors = fitter(self.layer, self.records, self.start, strength, reduce=same)
        return weights, errors

    def error(self, weights: Tensor) -> float:
        """Squared error relative to the targets."""
        wrong = self.features @ weights.double().T - self.target
        return float(wrong.square().sum() / self.target.square().sum())

    def objective(self, weights: Tensor, strength: float) -> float:
        """Squared error plus the shrinkage."""
        wrong = (self.features @ weights.double().T - self.target).square().sum()
        change = (weights.double() - self.start.double()).square().sum()
        return float(wrong + strength * self.energy * change)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fitter", FITTERS)
def test_the_errors_before_and_after_are_those_of_the_weights(family: str, fitter: Fitter) -> None:
    problem = Problem(family)
    weights, (before, after) = problem.solve(fitter, 0.1)
    assert before == pytest.approx(problem.error(problem.start), rel=1e-4)
    assert after == pytest.approx(problem.error(weights), rel=1e-4)
    assert after < before


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_more_sweeps_never_raise_the_objective_and_end_at_the_joint_solution(
    family: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(family)
    joint, _ = problem.solve(refit_jointly, strength)
    found = [problem.objective(problem.start, strength)]
    for sweeps in (1, 2, 4, 32):
        monkeypatch.setattr(refit, "_SWEEPS", sweeps)
        weights, _ = problem.solve(refit_by_sweeps, strength)
        found.append(problem.objective(weights, strength))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(found))
    assert found[-1] == pytest.approx(problem.objective(joint, strength), rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_sweeps_are_nearly_the_joint_solution(family: str) -> None:
    problem = Problem(family)
    found = [problem.objective(problem.solve(fitter, 0.1)[0], 0.1) for fitter in FITTERS]
    gain = problem.objective(problem.start, 0.1) - found[0]
    assert found[1] - found[0] < 0.05 * gain


@torch.no_grad()
@pytest.mark.parametrize("fitter", FITTERS)
def test_experts_that_no_token_visits_keep_their_matrices_exactly(fitter: Fitter) -> None:
    problem = Problem("mixtral")
    block, wanted = problem.records[0]
    seen = block.tokens.expert_indices
    keep = (seen != 3).all(1)
    assert not keep.all()
    problem.records = [(some(block, keep), wanted[keep])]
    weights, _ = problem.solve(fitter, 0.1)
    width = problem.layer.intermediate_size
    changed = (weights != problem.start).any(0).view(-1, width).any(1)
    assert changed.tolist() == [expert != 3 for expert in range(12)]


@torch.no_grad()
@pytest.mark.parametrize("family", MANY)
@pytest.mark.parametrize("fitter", FITTERS)
def test_weights_that_give_the_wanted_output_already_stay(family: str, fitter: Fitter) -> None:
    problem = Problem(family)
    block, _ = problem.records[0]
    problem.records = [(block, block.output - bias_output(problem.layer, block))]
    weights, (before, after) = problem.solve(fitter, 0.1)
    torch.testing.assert_close(weights, problem.start, rtol=0, atol=1e-4)
    assert before < 1e-6
    assert after < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("fitter", FITTERS)
def test_the_result_does_not_depend_on_batches(fitter: Fitter) -> None:
    problem = Problem("qwen2_moe")
    whole, _ = problem.solve(fitter, 0.1)
    block, wanted = problem.records[0]
    order = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(0)).split(17)
    problem.records = [(some(block, rows), wanted[rows]) for rows in order]
    parts, _ = problem.solve(fitter, 0.1)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fitter", FITTERS)
def test_bfloat16_weights_are_fitted_in_float32_and_rounded(fitter: Fitter) -> None:
    problem = Problem("mixtral")
    exact, _ = problem.solve(fitter, 0.1)
    problem.start = problem.start.bfloat16()
    weights, (_, after) = problem.solve(fitter, 0.1)
    assert weights.dtype == torch.bfloat16
    assert (weights.float() - exact).norm() < 0.01 * exact.norm()
    assert after == pytest.approx(problem.error(weights), rel=1e-3)
