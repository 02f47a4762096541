"""Router rows after merging, against loops over slots and members."""

import math

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.moments import Moments
from lightning_smoe.functional.router import (
    Grouping,
    LogSumExp,
    MeanRows,
    RouterRepair,
    RouterRows,
    Slice,
    router_features,
    router_targets,
)

# Experts 1 and 4 share slot 0, expert 5 was dropped, slot 2 has one member.
ASSIGNMENT = torch.tensor([1, 0, 1, 2, 0, -1, 1])
SHARES = torch.tensor([1.0, 2.0, 5.0, 3.0, 6.0, 9.0, 4.0], dtype=torch.float64)
GROUPING = Grouping(ASSIGNMENT, SHARES)
MEMBERS = [[1, 4], [0, 2, 6], [3]]
HEAVIEST = [4, 2, 3]
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(7, 8, generator=GENERATOR)
BIAS = torch.randn(7, generator=GENERATOR)
STATES = torch.randn(200, 8, generator=GENERATOR)
ROWS = RouterRows(WEIGHT, BIAS)
REPAIRS = [Slice(), MeanRows(), LogSumExp()]


def moments_of(rows: RouterRows, grouping: Grouping, states: Tensor = STATES) -> Moments:
    """Products over tokens, as the compression gathers them."""
    logits = torch.nn.functional.linear(states, rows.weight, rows.bias)
    features = router_features(states, rows.bias is not None)
    moments = Moments.zeros(features.shape[1], grouping.num_groups, states.device)
    moments.add(features, router_targets(logits, grouping))
    return moments


def repaired(
    repair: RouterRepair, rows: RouterRows = ROWS, grouping: Grouping = GROUPING
) -> RouterRows:
    moments = moments_of(rows, grouping) if repair.needs_tokens else None
    return repair(rows, grouping, moments)


def test_members_and_slots_are_those_of_the_assignment() -> None:
    assert GROUPING.num_groups == 3
    assert [GROUPING.members(group).tolist() for group in range(3)] == MEMBERS


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


@pytest.mark.parametrize("bias", [BIAS, None], ids=["bias", "no bias"])
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_log_sum_exp_is_the_ridge_regression_on_the_summed_exponentials(
    bias: Tensor | None, strength: float
) -> None:
    given = RouterRows(WEIGHT, bias)
    rows = repaired(LogSumExp(strength), given)
    features = torch.cat([STATES, torch.ones(200, 1)], dim=1)[:, : 8 + (bias is not None)].double()
    logits = torch.nn.functional.linear(STATES, WEIGHT, bias).double()
    start = MeanRows()(given, GROUPING, None)
    energy = features.square().sum(0).mean()
    for group, members in enumerate(MEMBERS[:2]):
        wanted = torch.tensor([math.log(sum(row[m].exp() for m in members)) for row in logits])
        first = start.weight[group]
        if start.bias is not None:
            first = torch.cat([first, start.bias[group : group + 1]])
        pull = (strength * energy).sqrt() * torch.eye(features.shape[1], dtype=torch.float64)
        matrix = torch.cat([features, pull])
        target = torch.cat([wanted.double(), pull @ first.double()])
        expected = torch.linalg.lstsq(matrix, target[:, None]).solution[:, 0].float()
        found = rows.weight[group]
        if rows.bias is not None:
            found = torch.cat([found, rows.bias[group : group + 1]])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_slot_of_two_equal_experts_gets_their_logit_plus_log_two() -> None:
    weight, bias = WEIGHT.clone(), BIAS.clone()
    weight[4], bias[4] = weight[1], bias[1]
    rows = repaired(LogSumExp(1e-6), RouterRows(weight, bias))
    assert rows.bias is not None
    torch.testing.assert_close(rows.weight[0], weight[1], rtol=0, atol=1e-4)
    assert rows.bias[0].item() == pytest.approx(bias[1].item() + math.log(2), abs=1e-4)


def test_without_a_bias_the_slot_answers_to_the_sum_better_than_the_mean_row() -> None:
    rows = RouterRows(WEIGHT, None)
    targets = router_targets(STATES @ WEIGHT.T, GROUPING)
    errors = [
        (STATES @ repaired(repair, rows).weight.T - targets).square().mean()
        for repair in (LogSumExp(), MeanRows())
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("repair", REPAIRS, ids=str)
def test_a_slot_of_one_keeps_its_row_exactly(repair: RouterRepair) -> None:
    rows = repaired(repair)
    assert torch.equal(rows.weight[2], WEIGHT[3])
    assert rows.bias is not None
    assert torch.equal(rows.bias[2], BIAS[3])


@pytest.mark.parametrize("repair", REPAIRS, ids=str)
def test_groups_of_one_are_a_permutation_of_the_rows(repair: RouterRepair) -> None:
    order = torch.tensor([3, 1, 0, 2, 6, 5, 4])
    rows = repaired(repair, grouping=Grouping(order.argsort(), SHARES))
    assert torch.equal(rows.weight, WEIGHT[order])


@pytest.mark.parametrize("repair", REPAIRS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_keep_their_dtype_and_a_missing_bias_stays_missing(
    repair: RouterRepair, dtype: torch.dtype
) -> None:
    moments = moments_of(RouterRows(WEIGHT, None), GROUPING)
    rows = repair(RouterRows(WEIGHT.to(dtype), None), GROUPING, moments)
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
    found = repair(rows, GROUPING, moments_of(rows, GROUPING, STATES.cuda()))
    torch.testing.assert_close(found.weight.cpu(), repaired(repair).weight, rtol=1e-4, atol=1e-4)


def test_log_sum_exp_needs_tokens() -> None:
    with pytest.raises(ValueError, match="fitted on calibration tokens and got none"):
        LogSumExp()(ROWS, GROUPING, None)


@pytest.mark.parametrize("strength", [0.0, -1.0, math.nan])
def test_strengths_that_are_not_positive_are_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        LogSumExp(strength)


def test_features_have_a_one_where_there_is_a_bias() -> None:
    assert torch.equal(router_features(STATES, False), STATES)
    with_one = router_features(STATES, True)
    assert torch.equal(with_one[:, :-1], STATES)
    assert torch.equal(with_one[:, -1], torch.ones(200))


def test_targets_are_the_log_of_the_summed_exponentials() -> None:
    logits = STATES @ WEIGHT.T + BIAS
    targets = router_targets(logits, GROUPING)
    for group, members in enumerate(MEMBERS):
        for token in range(0, 200, 40):
            total = sum(math.exp(logits[token, member]) for member in members)
            assert targets[token, group].item() == pytest.approx(math.log(total), abs=1e-5)
