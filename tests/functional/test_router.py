"""Router rows after merging, against loops over slots and members."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.router import (
    Grouping,
    LogSumExp,
    MeanRows,
    RouterBatch,
    RouterRepair,
    RouterRows,
    RouterTokens,
    Slice,
    router_features,
    router_targets,
)
from lightning_smoe.functional.router_fits import HessianRidge, TeacherLogits, TopKRidge
from lightning_smoe.functional.router_rows import MeanRowsPlusLogCount, WeightedMeanRows
from tests.functional.routers import (
    ASSIGNMENT,
    BIAS,
    GROUPING,
    HEAVIEST,
    MEMBERS,
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

PLAIN = [Slice(), MeanRows(), WeightedMeanRows(), MeanRowsPlusLogCount()]
FITTED = [
    LogSumExp(),
    TeacherLogits(),
    HessianRidge(),
    HessianRidge(states="original"),
    TopKRidge(top_k=2),
]
REPAIRS = [*PLAIN, *FITTED]
# Those that have no reason to touch a slot of one.
KEEP_SINGLES = [*PLAIN, LogSumExp()]
FOR_ALL_FAMILIES = [repair for repair in REPAIRS if not repair.needs_bias]


def test_members_and_slots_are_those_of_the_assignment() -> None:
    assert GROUPING.num_groups == 3
    assert [GROUPING.members(group).tolist() for group in range(3)] == MEMBERS
    assert GROUPING.sizes.tolist() == [2, 3, 1]


def test_mixing_divides_each_slot_among_its_members() -> None:
    mixing = GROUPING.mixing()
    for group, members in enumerate(MEMBERS):
        total = sum(float(SHARES[member]) for member in members)
        for expert in range(7):
            share = float(SHARES[expert]) / total if expert in members else 0.0
            assert mixing[group, expert].item() == pytest.approx(share, abs=1e-15)


def test_a_slot_whose_members_weigh_nothing_is_divided_evenly() -> None:
    shares = SHARES.clone()
    shares[[0, 2, 6]] = 0
    mixing = Grouping(ASSIGNMENT, shares).mixing()
    assert mixing[1].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0, 0, 0, 1 / 3])


@pytest.mark.parametrize("rows", [ROWS, WITHOUT_BIAS], ids=["bias", "no bias"])
def test_rows_are_joined_with_their_bias_and_taken_apart_again(rows: RouterRows) -> None:
    again = rows.like(rows.joined)
    assert torch.equal(again.weight, rows.weight)
    assert (again.bias is None) == (rows.bias is None)
    if again.bias is not None:
        assert torch.equal(again.bias, BIAS)


def test_slice_keeps_the_row_of_the_heaviest_member() -> None:
    rows = repaired(Slice())
    assert torch.equal(rows.weight, WEIGHT[HEAVIEST])
    assert rows.bias is not None
    assert torch.equal(rows.bias, BIAS[HEAVIEST])


def test_mean_rows_average_the_members_without_weights() -> None:
    rows = repaired(MeanRows())
    assert rows.bias is not None
    for group, members in enumerate(MEMBERS):
        torch.testing.assert_close(rows.weight[group], WEIGHT[members].mean(0))
        torch.testing.assert_close(rows.bias[group], BIAS[members].mean())


@pytest.mark.parametrize("given", [ROWS, WITHOUT_BIAS], ids=["bias", "no bias"])
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_log_sum_exp_is_the_ridge_regression_on_the_summed_exponentials(
    given: RouterRows, strength: float
) -> None:
    found = joined(repaired(LogSumExp(strength), given))
    features, start = features_of(given), joined(MeanRows()(given, GROUPING, None))
    wanted = log_sum_exp(logits_of(given))
    energy = features.square().sum(0).mean()
    pull = (strength * energy).sqrt() * torch.eye(features.shape[1], dtype=torch.float64)
    for group in range(2):
        matrix = torch.cat([features, pull])
        target = torch.cat([wanted[:, group], pull @ start[group]])
        expected = torch.linalg.lstsq(matrix, target[:, None]).solution[:, 0]
        torch.testing.assert_close(found[group], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("repair", [LogSumExp(1e-6), MeanRowsPlusLogCount()], ids=str)
def test_a_slot_of_two_equal_experts_gets_their_logit_plus_log_two(repair: RouterRepair) -> None:
    weight, bias = WEIGHT.clone(), BIAS.clone()
    weight[4], bias[4] = weight[1], bias[1]
    rows = repaired(repair, RouterRows(weight, bias))
    assert rows.bias is not None
    torch.testing.assert_close(rows.weight[0], weight[1], rtol=0, atol=1e-4)
    assert rows.bias[0].item() == pytest.approx(bias[1].item() + math.log(2), abs=1e-4)


def test_without_a_bias_the_slot_answers_to_the_sum_better_than_the_mean_row() -> None:
    targets = router_targets(logits_of(WITHOUT_BIAS), GROUPING)
    errors = [
        (logits_of(repaired(repair, WITHOUT_BIAS)) - targets).square().mean()
        for repair in (LogSumExp(), MeanRows())
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("repair", KEEP_SINGLES, ids=str)
def test_a_slot_of_one_keeps_its_row_exactly(repair: RouterRepair) -> None:
    rows = repaired(repair)
    assert torch.equal(rows.weight[2], WEIGHT[3])
    assert rows.bias is not None
    assert torch.equal(rows.bias[2], BIAS[3])


@pytest.mark.parametrize("repair", REPAIRS, ids=str)
@pytest.mark.parametrize("rows", [ROWS, WITHOUT_BIAS], ids=["bias", "no bias"])
def test_groups_of_one_are_a_permutation_of_the_rows_where_nothing_drifted(
    repair: RouterRepair, rows: RouterRows
) -> None:
    order = torch.tensor([3, 1, 0, 2, 6, 5, 4])
    tokens = tokens_of(rows, teacher_states=STATES)
    found = repair(rows, Grouping(order.argsort(), SHARES), tokens)
    exact = repair in [*KEEP_SINGLES, HessianRidge()]
    exactly: dict[str, Any] = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(found.weight, WEIGHT[order], **exactly)
    if found.bias is not None:
        torch.testing.assert_close(found.bias, BIAS[order], **exactly)


@pytest.mark.parametrize("repair", REPAIRS, ids=str)
def test_the_order_of_experts_does_not_matter(repair: RouterRepair) -> None:
    order = torch.tensor([6, 4, 5, 0, 2, 3, 1])
    rows = RouterRows(WEIGHT[order], BIAS[order])
    shuffled = repaired(repair, rows, Grouping(ASSIGNMENT[order], SHARES[order]))
    torch.testing.assert_close(joined(shuffled), joined(repaired(repair)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("repair", REPAIRS, ids=str)
def test_what_a_dropped_expert_said_does_not_matter(repair: RouterRepair) -> None:
    weight, bias = WEIGHT.clone(), BIAS.clone()
    weight[5], bias[5] = 100.0, 100.0
    assert torch.equal(joined(repaired(repair, RouterRows(weight, bias))), joined(repaired(repair)))


@pytest.mark.parametrize("repair", FITTED, ids=str)
@pytest.mark.parametrize("rows", [ROWS, WITHOUT_BIAS], ids=["bias", "no bias"])
def test_order_and_size_of_batches_do_not_matter(repair: RouterRepair, rows: RouterRows) -> None:
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    tokens = tokens_of(rows, STATES[order], TEACHER_STATES[order], (3, 0, 100, 97))
    found = repair(rows, GROUPING, tokens)
    torch.testing.assert_close(joined(found), joined(repaired(repair, rows)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("repair", FITTED, ids=str)
def test_without_any_token_a_fit_leaves_the_mean_rows(repair: RouterRepair) -> None:
    nothing: list[RouterBatch] = []
    empty = repair(ROWS, GROUPING, RouterTokens(nothing, lambda tensor: tensor))
    assert torch.equal(joined(empty), joined(repaired(MeanRows())))


@pytest.mark.parametrize("repair", FITTED, ids=str)
def test_states_whose_last_number_is_always_zero_keep_its_mean_weight(
    repair: RouterRepair,
) -> None:
    states, teacher = STATES.clone(), TEACHER_STATES.clone()
    states[:, -1], teacher[:, -1] = 0, 0
    found = repair(ROWS, GROUPING, tokens_of(ROWS, states, teacher))
    assert found.weight.isfinite().all()
    torch.testing.assert_close(found.weight[:, -1], repaired(MeanRows()).weight[:, -1])


@pytest.mark.parametrize("repair", FOR_ALL_FAMILIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_keep_their_dtype_and_a_missing_bias_stays_missing(
    repair: RouterRepair, dtype: torch.dtype
) -> None:
    given = RouterRows(WEIGHT.to(dtype), None)
    tokens = tokens_of(given, STATES.to(dtype), TEACHER_STATES.to(dtype))
    rows = repair(given, GROUPING, tokens)
    assert rows.weight.dtype == dtype
    assert rows.bias is None


@pytest.mark.parametrize("repair", REPAIRS, ids=str)
def test_the_original_rows_are_left_alone(repair: RouterRepair) -> None:
    weight, bias = WEIGHT.clone(), BIAS.clone()
    repaired(repair, RouterRows(weight, bias))
    assert torch.equal(weight, WEIGHT)
    assert torch.equal(bias, BIAS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("repair", REPAIRS, ids=str)
def test_rows_on_a_gpu_follow_a_grouping_on_the_cpu(repair: RouterRepair) -> None:
    rows = RouterRows(WEIGHT.cuda(), BIAS.cuda())
    found = repair(rows, GROUPING, tokens_of(rows, STATES.cuda(), TEACHER_STATES.cuda()))
    torch.testing.assert_close(found.weight.cpu(), repaired(repair).weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("repair", FITTED, ids=str)
def test_a_fit_needs_tokens(repair: RouterRepair) -> None:
    assert repair.needs_tokens
    with pytest.raises(ValueError, match="fitted on calibration tokens and got none"):
        repair(ROWS, GROUPING, None)


@pytest.mark.parametrize("kind", [LogSumExp, TeacherLogits, HessianRidge, TopKRidge])
@pytest.mark.parametrize("strength", [0.0, -1.0, math.nan])
def test_strengths_that_are_not_positive_are_refused(
    kind: type[LogSumExp | TeacherLogits | HessianRidge | TopKRidge], strength: float
) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        kind(strength=strength)


def test_features_have_a_one_where_there_is_a_bias() -> None:
    assert torch.equal(router_features(STATES, False), STATES)
    with_one = router_features(STATES, True)
    assert torch.equal(with_one[:, :-1], STATES)
    assert torch.equal(with_one[:, -1], torch.ones(200))


def test_targets_are_the_log_of_the_summed_exponentials() -> None:
    logits = logits_of(ROWS)
    targets: Tensor = router_targets(logits, GROUPING)
    torch.testing.assert_close(targets.double(), log_sum_exp(logits), rtol=0, atol=1e-5)
    assert torch.equal(targets[:, 2], logits[:, 3])
