"""Repairs that read no token, against loops over members."""

import math

import pytest
import torch

from lightning_smoe.errors import InputError
from lightning_smoe.functional.router import Grouping, MeanRows, RouterRows
from lightning_smoe.functional.router_rows import Map, MeanRowsPlusLogCount, WeightedMeanRows
from tests.functional.routers import (
    ASSIGNMENT,
    BIAS,
    GROUPING,
    MEMBERS,
    ROWS,
    SHARES,
    STATES,
    WEIGHT,
    WITHOUT_BIAS,
    joined,
    logits_of,
    repaired,
)


def test_weighted_mean_rows_average_the_members_by_share() -> None:
    rows = repaired(WeightedMeanRows())
    assert rows.bias is not None
    for group, members in enumerate(MEMBERS):
        total = sum(float(SHARES[member]) for member in members)
        weight, bias = torch.zeros(8), 0.0
        for member in members:
            weight += float(SHARES[member]) / total * WEIGHT[member]
            bias += float(SHARES[member]) / total * float(BIAS[member])
        torch.testing.assert_close(rows.weight[group], weight)
        assert rows.bias[group].item() == pytest.approx(bias, abs=1e-6)


def test_with_equal_shares_the_weighted_mean_is_the_mean() -> None:
    equal = Grouping(ASSIGNMENT, torch.full_like(SHARES, 0.3))
    found = joined(repaired(WeightedMeanRows(), grouping=equal))
    torch.testing.assert_close(found, joined(repaired(MeanRows())))


def test_a_member_without_a_share_has_no_say_in_the_weighted_mean() -> None:
    shares = SHARES.clone()
    shares[1] = 0
    rows = repaired(WeightedMeanRows(), grouping=Grouping(ASSIGNMENT, shares))
    assert torch.equal(rows.weight[0], WEIGHT[4])


def test_the_log_count_is_added_to_the_mean_of_the_members_logits() -> None:
    found = logits_of(repaired(MeanRowsPlusLogCount()))
    logits = logits_of(ROWS)
    for group, members in enumerate(MEMBERS):
        for token in range(0, 200, 40):
            mean = sum(logits[token, member].item() for member in members) / len(members)
            wanted = mean + math.log(len(members))
            assert found[token, group].item() == pytest.approx(wanted, abs=1e-5)


def test_the_log_count_is_never_more_than_the_log_sum_exp() -> None:
    found, logits = logits_of(repaired(MeanRowsPlusLogCount())), logits_of(ROWS)
    for group, members in enumerate(MEMBERS):
        assert (found[:, group] <= logits[:, members].logsumexp(1) + 1e-5).all()


def test_a_log_count_that_cannot_be_stored_is_refused() -> None:
    assert MeanRowsPlusLogCount.needs_bias
    with pytest.raises(InputError, match=r"no bias to store it; set router to .*LogSumExp"):
        MeanRowsPlusLogCount()(WITHOUT_BIAS, GROUPING, None)


def test_slots_of_one_need_no_bias_for_their_log_count() -> None:
    kept = Grouping(torch.tensor([-1, 0, 1, 2, -1, -1, 3]), SHARES)
    rows = MeanRowsPlusLogCount()(WITHOUT_BIAS, kept, None)
    assert torch.equal(rows.weight, WEIGHT[[1, 2, 3, 6]])
    assert rows.bias is None


def test_the_map_keeps_all_rows_and_gives_none() -> None:
    assert Map.keeps_all_rows
    assert not Map.needs_tokens
    with pytest.raises(ValueError, match="leaves the router's rows as they are"):
        Map()(RouterRows(WEIGHT, BIAS), GROUPING, None)


def test_the_softmax_of_log_sum_exp_logits_is_what_the_map_sums() -> None:
    # The law that ties the two: with exact targets, a stock router is the map's softmax.
    probs = logits_of(ROWS, STATES)[:, ASSIGNMENT >= 0].softmax(1)
    slots = ASSIGNMENT[ASSIGNMENT >= 0]
    targets = torch.stack([logits_of(ROWS)[:, m].logsumexp(1) for m in MEMBERS], dim=1)
    for token in range(0, 200, 40):
        for group in range(3):
            summed = sum(probs[token, i].item() for i in range(6) if slots[i] == group)
            assert targets[token].softmax(0)[group].item() == pytest.approx(summed, abs=1e-6)
