"""Closed-form fits against torch.linalg.lstsq and against the softmax they stand for."""

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.refit import log_sum_exp_targets, ridge_toward

NUM_TOKENS, NUM_FEATURES, NUM_OUTPUTS = 20, 6, 3
GENERATOR = torch.Generator().manual_seed(0)
# Features and outputs by tokens, as in the formula.
PHI = torch.randn(6, 20, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(3, 20, generator=GENERATOR, dtype=torch.float64)
START = torch.randn(3, 6, generator=GENERATOR, dtype=torch.float64)
LOGITS = torch.randn(5, 6, generator=GENERATOR)


def fit(phi: Tensor, strength: float, start: Tensor = START, y: Tensor = Y) -> Tensor:
    return ridge_toward(start, phi @ phi.mT, y @ phi.mT, strength)


@pytest.mark.parametrize("strength", [0.001, 0.1, 10.0])
def test_ridge_equals_least_squares_with_the_start_weights_as_extra_tokens(strength: float) -> None:
    shrinkage = (strength * (PHI @ PHI.mT).diagonal().mean()).sqrt()
    extra_phi = shrinkage * torch.eye(NUM_FEATURES, dtype=torch.float64)
    phi = torch.cat([PHI, extra_phi], dim=1)
    y = torch.cat([Y, START @ extra_phi], dim=1)
    expected = torch.linalg.lstsq(phi.mT, y.mT).solution.mT
    torch.testing.assert_close(fit(PHI, strength), expected)


def test_weak_shrinkage_recovers_the_map_that_made_the_targets() -> None:
    truth = START + 1
    torch.testing.assert_close(fit(PHI, 1e-12, y=truth @ PHI), truth, rtol=0, atol=1e-8)


def test_strong_shrinkage_keeps_the_start_weights() -> None:
    torch.testing.assert_close(fit(PHI, 1e12), START)


def test_start_weights_that_fit_already_stay() -> None:
    torch.testing.assert_close(fit(PHI, 0.1, y=START @ PHI), START)


def test_features_that_never_fired_keep_their_weights_and_change_no_other() -> None:
    phi = PHI.clone()
    phi[[1, 4]] = 0
    fired = [0, 2, 3, 5]
    fitted = fit(phi, 0.1)
    assert torch.equal(fitted[:, [1, 4]], START[:, [1, 4]])
    torch.testing.assert_close(fitted[:, fired], fit(PHI[fired], 0.1, START[:, fired]))


def test_without_any_data_the_start_weights_are_returned() -> None:
    fitted = fit(torch.zeros_like(PHI), 0.1)
    assert torch.equal(fitted, START)


def test_the_fit_has_the_dtype_of_the_start_and_leaves_inputs_alone() -> None:
    start = START.bfloat16()
    gram, cross = PHI @ PHI.mT, Y @ PHI.mT
    fitted = ridge_toward(start, gram, cross, 0.1)
    assert fitted.dtype == torch.bfloat16
    assert torch.equal(start, START.bfloat16())
    assert torch.equal(gram, PHI @ PHI.mT)
    wide = ridge_toward(start.double(), gram, cross, 0.1)
    assert torch.equal(fitted, wide.bfloat16())


@pytest.mark.parametrize("strength", [0.0, -0.1])
def test_strengths_that_are_not_positive_are_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="take a positive one"):
        fit(PHI, strength)


def test_softmax_of_the_targets_sums_the_members_probabilities() -> None:
    assignment = torch.tensor([1, 0, 1, 2, 0, 1])
    merged = log_sum_exp_targets(LOGITS, assignment, 3).softmax(-1)
    single = LOGITS.softmax(-1)
    for group in range(3):
        members = [expert for expert in range(6) if assignment[expert] == group]
        torch.testing.assert_close(merged[:, group], sum(single[:, member] for member in members))


def test_a_group_of_one_keeps_its_logit_and_dropped_experts_are_ignored() -> None:
    targets = log_sum_exp_targets(LOGITS, torch.tensor([-1, 0, -1, 1, -1, 2]), 3)
    assert torch.equal(targets, LOGITS[:, [1, 3, 5]])


def test_half_precision_logits_give_float32_targets() -> None:
    targets = log_sum_exp_targets(LOGITS.bfloat16(), torch.tensor([0, 0, 0, 0, 1, 1]), 2)
    assert targets.dtype == torch.float32


@pytest.mark.parametrize("assignment", [[0, 0, 2, 2, 0, 2], [0, 1, 2, 3, 0, 0]])
def test_assignments_that_do_not_fill_the_groups_are_refused(assignment: list[int]) -> None:
    with pytest.raises(ValueError, match="give each of the groups 0 to 2 a member"):
        log_sum_exp_targets(LOGITS, torch.tensor(assignment), 3)
