"""Laws that every router repair obeys."""

import math
from typing import Any

import pytest
import torch

from lightning_smoe.functional.router import (
    Grouping,
    LogSumExp,
    MeanRows,
    RouterBatch,
    RouterRepair,
    RouterRows,
    RouterTokens,
    Slice,
)
from lightning_smoe.functional.router_fits import HessianRidge, TeacherLogits, TopKRidge
from lightning_smoe.functional.router_rows import MeanRowsPlusLogCount, WeightedMeanRows
from tests.functional.routers import (
    ASSIGNMENT,
    BIAS,
    GROUPING,
    ROWS,
    SHARES,
    STATES,
    TEACHER_STATES,
    WEIGHT,
    WITHOUT_BIAS,
    joined,
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
