"""The refit of one layer, in one system of equations and expert by expert."""

import pytest
import torch

from lightning_smoe.compression.record import bias_output
from lightning_smoe.compression.refit import RefitOutcome, RefitRecord, judged
from lightning_smoe.functional.refit import Refit
from tests.compression.plans import MANY
from tests.compression.problems import FITTERS, Problem, some

FAMILIES = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"]
STRENGTHS = Refit().strengths


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fitter", FITTERS)
def test_the_fit_is_least_squares_on_all_tokens(family: str, fitter: str) -> None:
    problem = Problem(family)
    weights, outcome = problem.solve(fitter, Refit(10.0))
    assert outcome.applied
    expected = problem.solution(10.0)
    change = expected - problem.start.double()
    assert (weights.double() - expected).norm() < 3e-3 * change.norm()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strength", [3.0, 10.0])
def test_both_ways_reach_the_same_objective(family: str, strength: float) -> None:
    problem = Problem(family, part=0.3)
    found = []
    for fitter in FITTERS:
        weights, outcome = problem.solve(fitter, Refit(strength))
        assert outcome.applied
        found.append(problem.objective(weights, strength))
    assert abs(found[1] - found[0]) < 1e-4
    assert found[0] < 0.9 * problem.objective(problem.start, strength)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fitter", FITTERS)
def test_the_errors_before_and_after_are_those_on_held_out_tokens(family: str, fitter: str) -> None:
    problem = Problem(family)
    held_out = problem.held_out
    _, outcome = problem.solve(fitter, Refit(10.0))
    assert outcome.before == pytest.approx(problem.error(problem.start, held_out), rel=1e-4)
    # What was held out has no part in it.
    taught = problem.solution(10.0, ~held_out)
    tolerance = 1e-4 if fitter == "jointly" else 1e-3
    assert outcome.after == pytest.approx(problem.error(taught, held_out), rel=tolerance)
    assert outcome.strength == 10.0


@torch.no_grad()
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fitter", FITTERS)
def test_the_strength_is_the_one_that_does_best_on_held_out_tokens(
    family: str, noise: float, fitter: str
) -> None:
    problem = Problem(family, part=0.3, noise=noise)
    held_out = problem.held_out
    errors = []
    for strength in STRENGTHS:
        taught = problem.solution(strength, ~held_out)
        errors.append(problem.error(taught, held_out))
    _, outcome = problem.solve(fitter, Refit())
    # Sweeps try each strength for a few rounds only, and may take the next to the best.
    assert errors[STRENGTHS.index(outcome.strength)] < 1.05 * min(errors)
    if fitter == "jointly":
        assert outcome.strength == STRENGTHS[errors.index(min(errors))]
        assert outcome.after == pytest.approx(min(errors), rel=1e-4)
        assert outcome.applied == (min(errors) < problem.error(problem.start, held_out))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fitter", FITTERS)
def test_a_fit_that_raises_the_held_out_error_is_left_out(family: str, fitter: str) -> None:
    # The layer gives the wanted outputs already, but for noise that no weights explain.
    problem = Problem(family, part=0.0, noise=0.5)
    weights, outcome = problem.solve(fitter, Refit())
    assert not outcome.applied
    assert outcome.after > outcome.before
    assert torch.equal(weights, problem.start)
    assert str(outcome).endswith(f" -> {outcome.after:.4f}: the refit is left out")


def test_an_outcome_says_what_was_done() -> None:
    done = judged(0.5, {0.1: 0.4, 0.3: 0.25, 1.0: 0.25})
    assert done == RefitOutcome(0.5, 0.25, 0.3, applied=True)
    assert str(done) == "held-out layer error 0.5000 -> 0.2500 (strength 0.3)"
    assert not judged(0.25, {0.1: 0.25}).applied
    assert not judged(float("nan"), {0.1: float("nan")}).applied


@torch.no_grad()
@pytest.mark.parametrize("fitter", FITTERS)
@pytest.mark.parametrize("held_out", [False, True])
def test_where_nothing_can_be_held_out_all_tokens_judge(fitter: str, held_out: bool) -> None:
    problem = Problem("mixtral")
    problem.records = [
        RefitRecord(problem.block, problem.wanted, torch.full_like(problem.held_out, held_out))
    ]
    weights, outcome = problem.solve(fitter, Refit(1.0))
    assert outcome.before == pytest.approx(problem.error(problem.start), rel=1e-4)
    assert outcome.after == pytest.approx(problem.error(weights), rel=0.05)
    assert outcome.applied


@torch.no_grad()
@pytest.mark.parametrize("fitter", FITTERS)
def test_without_any_token_nothing_is_fitted(fitter: str) -> None:
    problem = Problem("qwen2_moe")
    problem.restrict(torch.zeros(0, dtype=torch.int64))
    weights, outcome = problem.solve(fitter, Refit())
    assert torch.equal(weights, problem.start)
    assert not outcome.applied


@torch.no_grad()
@pytest.mark.parametrize("fitter", FITTERS)
def test_experts_that_no_token_visits_keep_their_matrices_exactly(fitter: str) -> None:
    problem = Problem("mixtral", part=0.3)
    keep = (problem.block.tokens.expert_indices != 3).all(1)
    assert not keep.all()
    problem.restrict(keep)
    weights, outcome = problem.solve(fitter, Refit(1.0))
    assert outcome.applied
    width = problem.layer.intermediate_size
    changed = (weights != problem.start).any(0).view(-1, width).any(1)
    assert changed.tolist() == [expert != 3 for expert in range(12)]
    assert weights.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("family", MANY)
@pytest.mark.parametrize("fitter", FITTERS)
def test_weights_that_give_the_wanted_output_already_stay(family: str, fitter: str) -> None:
    weights, outcome = Problem(family, part=0.0).solve(fitter, Refit(0.1))
    problem = Problem(family, part=0.0)
    torch.testing.assert_close(weights, problem.start, rtol=0, atol=1e-4)
    assert outcome.before < 1e-6
    assert outcome.after < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("fitter", FITTERS)
def test_the_result_does_not_depend_on_batches(fitter: str) -> None:
    problem = Problem("qwen2_moe", part=0.3)
    whole, outcome = problem.solve(fitter, Refit(3.0))
    count = len(problem.wanted)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).split(17)
    problem.records = [
        RefitRecord(some(problem.block, rows), problem.wanted[rows], problem.held_out[rows])
        for rows in order
    ]
    parts, other = problem.solve(fitter, Refit(3.0))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert other.after == pytest.approx(outcome.after, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("fitter", FITTERS)
def test_bfloat16_weights_are_fitted_in_float32_and_rounded(fitter: str) -> None:
    problem = Problem("mixtral", part=0.3)
    exact, _ = problem.solve(fitter, Refit(1.0))
    problem.start = problem.start.bfloat16()
    weights, outcome = problem.solve(fitter, Refit(1.0))
    assert outcome.applied
    assert weights.dtype == torch.bfloat16
    assert (weights.float() - exact).norm() < 0.02 * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_more_sweeps_never_raise_the_objective(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(family, part=0.3)
    last = problem.objective(problem.start, 3.0)
    for sweeps in (1, 2, 20):
        monkeypatch.setattr("lightning_smoe.compression.sweeps._MOST_SWEEPS", sweeps)
        weights, outcome = problem.solve("by sweeps", Refit(3.0))
        assert outcome.applied
        now = problem.objective(weights, 3.0)
        assert now <= last * (1 + 1e-6)
        last = now


def test_targets_leave_biases_out() -> None:
    problem = Problem("gpt_oss", part=0.0)
    rebuilt = problem.features @ problem.start.double().T
    torch.testing.assert_close(rebuilt, problem.target, rtol=1e-4, atol=1e-5)
    assert bias_output(problem.layer, problem.block).any()
