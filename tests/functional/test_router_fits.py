"""Router fits against dense systems of equations, and their laws."""

from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lightning_smoe.errors import InputError
from lightning_smoe.functional.router import (
    Grouping,
    LogSumExp,
    MeanRows,
    RouterBatch,
    RouterRepair,
    RouterRows,
    RouterTokens,
)
from lightning_smoe.functional.router_fits import HessianRidge, TeacherLogits, TopKRidge
from tests.functional.routers import (
    GROUPING,
    ROWS,
    SHARES,
    STATES,
    TEACHER_STATES,
    WEIGHT,
    WITHOUT_BIAS,
    features_of,
    joined,
    log_sum_exp,
    logits_of,
    repaired,
    tokens_of,
)

FAMILIES = pytest.mark.parametrize("given", [ROWS, WITHOUT_BIAS], ids=["bias", "no bias"])


def dense_fit(given: RouterRows, targets: Tensor, matrices: Tensor, strength: float) -> Tensor:
    """Solves for all rows at once, every token with its own matrix, by one dense system."""
    features, start = features_of(given), joined(repaired(MeanRows(), given))
    size = start.numel()
    system, right = torch.zeros(size, size).double(), torch.zeros(size).double()
    for feature, target, matrix in zip(features, targets, matrices, strict=True):
        system += torch.kron(matrix, torch.outer(feature, feature))
        right += torch.outer(matrix @ (target - start @ feature), feature).reshape(-1)
    system += strength * system.diagonal().mean() * torch.eye(size)
    solution: Tensor = torch.linalg.solve(system, right)
    return start + solution.view_as(start)


def hessians(targets: Tensor) -> Tensor:
    """`diag p - p p^T` of every token."""
    return torch.stack([p.diag() - torch.outer(p, p) for p in targets.softmax(1)])


@FAMILIES
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_teacher_logits_are_fitted_on_the_students_states(
    given: RouterRows, strength: float
) -> None:
    targets = log_sum_exp(logits_of(given, TEACHER_STATES))
    expected = dense_fit(given, targets, torch.eye(3).double().expand(200, 3, 3), strength)
    found = joined(repaired(TeacherLogits(strength), given))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_without_drift_teacher_logits_are_log_sum_exp() -> None:
    found = TeacherLogits(1e-3)(ROWS, GROUPING, tokens_of(ROWS, teacher_states=STATES))
    expected = repaired(LogSumExp(1e-3))
    torch.testing.assert_close(joined(found), joined(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "repair",
    [TeacherLogits(1e-6), HessianRidge(1e-6, states="original"), TopKRidge(7, 1e-6)],
    ids=str,
)
def test_linear_drift_is_undone(repair: RouterRepair) -> None:
    drift = torch.eye(8) + 0.2 * torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    every = Grouping(torch.arange(7), SHARES)
    tokens = tokens_of(WITHOUT_BIAS, STATES @ drift.T, STATES)
    found = logits_of(repair(WITHOUT_BIAS, every, tokens), STATES @ drift.T)
    wanted = logits_of(WITHOUT_BIAS, STATES)
    torch.testing.assert_close(found.softmax(1), wanted.softmax(1), rtol=0, atol=1e-3)
    drifted = logits_of(WITHOUT_BIAS, STATES @ drift.T)
    assert (drifted.softmax(1) - wanted.softmax(1)).abs().max() > 0.1


@FAMILIES
@pytest.mark.parametrize("strength", [1e-3, 1.0])
@pytest.mark.parametrize("states", ["compressed", "original"])
def test_hessian_ridge_solves_the_coupled_system(
    given: RouterRows, strength: float, states: Literal["compressed", "original"]
) -> None:
    targets = log_sum_exp(logits_of(given, STATES if states == "compressed" else TEACHER_STATES))
    expected = dense_fit(given, targets, hessians(targets), strength)
    found = joined(repaired(HessianRidge(strength, states), given))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_hessian_ridge_comes_nearest_to_the_original_softmax() -> None:
    wanted = log_sum_exp(logits_of(ROWS)).softmax(1)
    divergences = []
    for repair in (HessianRidge(1e-3), LogSumExp(), MeanRows()):
        logits = logits_of(repaired(repair)).double()
        divergences.append((wanted * (wanted.log() - logits.log_softmax(1))).sum(1).mean().item())
    assert divergences == sorted(divergences)
    assert divergences[0] < 0.95 * divergences[1]


def test_what_all_logits_of_a_token_share_does_not_move_the_hessian_ridge() -> None:
    shift = 5 * torch.randn(200, 1, generator=torch.Generator().manual_seed(3))
    fits = []
    for extra in (torch.zeros(200, 1), shift):
        logits = logits_of(ROWS) + extra
        tokens = RouterTokens([RouterBatch(STATES, logits, logits)], lambda tensor: tensor)
        fits.append(joined(HessianRidge()(ROWS, GROUPING, tokens)))
    torch.testing.assert_close(fits[1], fits[0], rtol=1e-3, atol=1e-4)


def test_more_steps_come_nearer_and_one_is_better_than_none() -> None:
    targets = log_sum_exp(logits_of(ROWS))
    errors = []
    for rows in (
        repaired(MeanRows()),
        *(repaired(HessianRidge(1e-3, "compressed", steps)) for steps in (1, 2, 5, 100)),
    ):
        missing = targets - features_of(ROWS) @ joined(rows).T
        errors.append(torch.einsum("ti,tij,tj->", missing, hessians(targets), missing).item())
    assert all(after < before for before, after in pairwise(errors))
    assert errors[1] < 0.5 * errors[0]


@FAMILIES
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_the_top_k_ridge_looks_at_the_largest_logits_of_a_token(
    given: RouterRows, strength: float
) -> None:
    targets = log_sum_exp(logits_of(given, TEACHER_STATES))
    masks = torch.zeros(200, 3, 3).double()
    for token, target in enumerate(targets.tolist()):
        for slot in sorted(range(3), key=lambda group: -target[group])[:2]:
            masks[token, slot, slot] = 1
    expected = dense_fit(given, targets, masks, strength)
    found = joined(repaired(TopKRidge(2, strength), given))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_top_k_ridge_over_all_slots_is_the_ridge_to_teacher_logits() -> None:
    found, expected = repaired(TopKRidge(3, 0.01)), repaired(TeacherLogits(0.01))
    torch.testing.assert_close(joined(found), joined(expected), rtol=1e-3, atol=1e-4)


def test_a_slot_that_no_token_ranks_high_keeps_its_mean_row() -> None:
    teacher = logits_of(ROWS)
    teacher[:, 3] = -1e4
    tokens = RouterTokens([RouterBatch(STATES, teacher, teacher)], lambda tensor: tensor)
    for repair in (TopKRidge(2), HessianRidge()):
        rows = repair(ROWS, GROUPING, tokens)
        torch.testing.assert_close(rows.weight[2], WEIGHT[3])


def test_more_top_logits_than_slots_are_refused() -> None:
    with pytest.raises(InputError, match="top_k=8 but the plan keeps 3 experts"):
        repaired(TopKRidge())


@pytest.mark.parametrize("change", [{"num_steps": 0}, {"top_k": 0}])
def test_counts_below_one_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        TopKRidge(**change)
