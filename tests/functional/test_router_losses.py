"""Losses of routers against loops over experts."""

import math

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.router_losses import (
    load_balance,
    router_divergence,
    router_log_probs,
    router_score,
    router_z,
    sum_by_group,
)
from lightning_smoe.functional.routing import Score

TOKENS, ROWS, TOP_K = 6, 7, 3
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(TOKENS, ROWS, generator=GENERATOR, dtype=torch.float64)
SCORES: list[Score] = ["softmax", "sigmoid"]


def masses(score: Score) -> Tensor:
    """Probabilities that sum to one."""
    scores = LOGITS.exp() if score == "softmax" else 1 / (1 + (-LOGITS).exp())
    return scores / scores.sum(1, keepdim=True)


@pytest.mark.parametrize("score", SCORES)
def test_probabilities_are_scores_over_their_sum(score: Score) -> None:
    torch.testing.assert_close(router_log_probs(LOGITS, score).exp(), masses(score))
    assert router_log_probs(LOGITS.bfloat16(), score).dtype == torch.float32


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("normal", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_the_score_is_found_from_the_weights(score: Score, normal: bool, scale: float) -> None:
    scores = LOGITS.softmax(1) if score == "softmax" else LOGITS.sigmoid()
    weights, selected = scores.topk(TOP_K)
    if normal:
        weights = weights / weights.sum(1, keepdim=True)
    assert router_score(LOGITS, selected, scale * weights) == score
    assert router_score(LOGITS.float(), selected, (scale * weights).bfloat16()) == score


def test_one_selected_row_fits_both_scores_and_is_called_softmax() -> None:
    _, selected = LOGITS.topk(1)
    assert router_score(LOGITS, selected, torch.ones(TOKENS, 1)) == "softmax"


def test_weights_of_no_known_rule_count_as_softmax() -> None:
    _, selected = LOGITS.topk(TOP_K)
    assert router_score(LOGITS, selected, torch.ones(TOKENS, TOP_K)) == "softmax"


@pytest.mark.parametrize(
    "groups",
    [
        [0, 1, 2, 0, 1, 2, 2],
        [2, 1, 0, 0, 0, 0, 1],
        [0, -1, 1, 2, -1, -1, 2],
        [2, 1, 0, -1, -1, -1, -1],
    ],
)
def test_groups_have_the_mass_of_their_rows(groups: list[int]) -> None:
    probs = LOGITS.softmax(1)
    found = sum_by_group(probs.log(), torch.tensor(groups), 3).exp()
    for token in range(TOKENS):
        kept = sum(float(probs[token, row]) for row in range(ROWS) if groups[row] >= 0)
        for group in range(3):
            rows = [row for row in range(ROWS) if groups[row] == group]
            wanted = sum(float(probs[token, row]) for row in rows) / kept
            assert float(found[token, group]) == pytest.approx(wanted)


def test_rows_that_are_groups_stay_as_they_are() -> None:
    log_probs = LOGITS.log_softmax(1)
    assert sum_by_group(log_probs, torch.arange(ROWS), ROWS) is log_probs
    turned = torch.arange(ROWS).flip(0)
    torch.testing.assert_close(
        sum_by_group(log_probs, turned, ROWS), log_probs.flip(1), rtol=0, atol=0
    )


def test_a_group_without_mass_or_rows_adds_nothing() -> None:
    log_probs = torch.tensor([[0.0, -400.0, -500.0]])
    found = sum_by_group(log_probs, torch.tensor([0, 1, 1]), 3)
    assert found.tolist() == [[0.0, -400.0, -math.inf]]
    student = torch.tensor([[-0.1, -2.0, -3.0]], requires_grad=True)
    loss = router_divergence(found, student)
    assert loss.item() == pytest.approx(0.1)
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[-1, 0, 0]]


def test_gradients_through_groups_are_those_of_finite_differences() -> None:
    groups = torch.tensor([0, -1, 1, 2, 0, 0, 2])

    def loss(logits: Tensor) -> Tensor:
        return sum_by_group(router_log_probs(logits, "sigmoid"), groups, 3)

    assert torch.autograd.gradcheck(loss, (LOGITS.clone().requires_grad_(),))


def test_divergence_is_the_sum_over_groups() -> None:
    p, q = masses("softmax"), masses("sigmoid")
    found = router_divergence(p.log(), q.log())
    for token in range(TOKENS):
        pairs = zip(p[token].tolist(), q[token].tolist(), strict=True)
        assert float(found[token]) == pytest.approx(sum(a * math.log(a / b) for a, b in pairs))


def test_balance_is_the_sum_over_experts_of_load_times_probability() -> None:
    probs = masses("softmax")
    load = torch.rand(ROWS, dtype=torch.float64, generator=GENERATOR)
    load = load / load.sum()
    wanted = sum(float(load[e]) * float(probs[:, e].mean()) for e in range(ROWS)) * ROWS
    assert float(load_balance(probs, load).mean()) == pytest.approx(wanted)


def test_even_loads_give_one_and_one_expert_for_all_gives_their_number() -> None:
    even = torch.full((ROWS,), 1 / ROWS, dtype=torch.float64)
    torch.testing.assert_close(
        load_balance(masses("sigmoid"), even), torch.ones(TOKENS, dtype=torch.float64)
    )
    first = torch.zeros(ROWS, dtype=torch.float64)
    first[0] = 1
    assert load_balance(first.expand(TOKENS, -1), first).tolist() == [ROWS] * TOKENS


def test_z_is_the_squared_log_of_the_sum() -> None:
    found = router_z(LOGITS)
    for token in range(TOKENS):
        total = sum(math.exp(logit) for logit in LOGITS[token].tolist())
        assert float(found[token]) == pytest.approx(math.log(total) ** 2)
