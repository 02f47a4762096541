"""Router rows after merging, against loops over slots and members."""

import math

import pytest
import torch
from torch import Tensor

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
from lightning_smoe.functional.router_rows import MeanRowsPlusLogCount
from tests.functional.routers import (
    ASSIGNMENT,
    BIAS,
    GROUPING,
    HEAVIEST,
    MEMBERS,
    ROWS,
    SHARES,
    STATES,
    WEIGHT,
    WITHOUT_BIAS,
    features_of,
    joined,
    log_sum_exp,
    logits_of,
    repaired,
)


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
