"""Merging against loops and torch.linalg.svd; the laws that every merger obeys."""

import pytest
import torch

from lightning_smoe.functional.alignment import Alignment, ByActivations, ByBoth, ByWeights
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.interpolation import Karcher, Ties
from lightning_smoe.functional.least_squares import LeastSquares, RegMean, RoutedLeastSquares
from lightning_smoe.functional.merging import (
    Average,
    Dominant,
    GroupTokens,
    Merger,
    UnionSVD,
)
from lightning_smoe.functional.whitening import WhitenedUnionSVD
from tests.functional.groups import KINDS, SHARES, group_of, reordered, tokens_of
from tests.functional.layers import swiglu
from tests.weights import parts

AVERAGES = [Average(), UnionSVD(), UnionSVD(rank=8), WhitenedUnionSVD(rank=8)]
# All that keep an expert as it is; low ranks do not.
FAITHFUL = [
    *AVERAGES,
    Dominant(),
    Karcher(),
    Karcher(vector="matrix"),
    Ties(),
    Ties(density=1.0),
    RegMean(),
    LeastSquares(),
    LeastSquares(start=Ties(density=0.5)),
    RoutedLeastSquares(),
    RoutedLeastSquares(start=RegMean(), strength=0.01),
]
ALL = [*FAITHFUL, UnionSVD(rank=2), WhitenedUnionSVD(rank=2)]
SHUFFLED = torch.tensor([2, 0, 1])

every_merger = pytest.mark.parametrize("merger", ALL, ids=str)
every_faithful_merger = pytest.mark.parametrize("merger", FAITHFUL, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS)


def assert_same(actual: ExpertWeights, expected: ExpertWeights, tolerance: float = 1e-6) -> None:
    for ours, theirs in zip(parts(actual), parts(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@every_kind
@every_faithful_merger
def test_merging_equal_experts_gives_either(merger: Merger, kind: str) -> None:
    expert = group_of(kind, 1)
    members = expert.select(torch.tensor([0, 0, 0]))
    assert_same(merger(members, SHARES, tokens_of()), expert, tolerance=1e-5)


@pytest.mark.parametrize("alignment", [ByWeights(), ByActivations(), ByBoth()], ids=str)
@every_faithful_merger
def test_merging_equal_experts_in_other_orders_gives_either_once_they_are_aligned(
    merger: Merger, alignment: Alignment
) -> None:
    expert, tokens = group_of("biased", 1), tokens_of()
    orders = ([0, 1, 2, 3, 4], [3, 0, 4, 1, 2], [1, 2, 0, 4, 3])
    shuffled = ExpertWeights.stack([reordered(expert, order) for order in orders])
    aligned = alignment(shuffled, 0, tokens)
    assert_same(merger(aligned, SHARES, tokens), expert, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_faithful_merger
def test_merging_one_expert_changes_nothing(merger: Merger, dtype: torch.dtype) -> None:
    expert = group_of(num_members=1, dtype=dtype)
    assert_same(merger(expert, torch.tensor([0.3]), tokens_of(1, dtype)), expert)


@every_kind
@every_merger
def test_the_order_of_the_members_does_not_matter(merger: Merger, kind: str) -> None:
    members, tokens = group_of(kind), tokens_of()
    moved = GroupTokens(tokens.states, tokens.gates[:, SHUFFLED], swiglu)
    expected = merger(members, SHARES, tokens)
    actual = merger(members.select(SHUFFLED), SHARES[SHUFFLED], moved)
    assert_same(actual, expected, tolerance=2e-5)


@pytest.mark.parametrize("num_tokens", [0, 60])
@every_merger
def test_a_group_without_traffic_is_merged_all_the_same(merger: Merger, num_tokens: int) -> None:
    members, states = group_of(), tokens_of().states[:num_tokens]
    tokens = GroupTokens(states, torch.zeros(num_tokens, 3), swiglu)
    merged = merger(members, torch.zeros(3), tokens)
    assert all(part.isfinite().all() for part in parts(merged))
    assert max(float(part.abs().max()) for part in parts(merged)) < 10


@every_merger
def test_a_member_without_traffic_gives_finite_weights(merger: Merger) -> None:
    members, tokens = group_of(), tokens_of()
    tokens.gates[:, 1] = 0
    merged = merger(members, torch.tensor([0.2, 0.0, 0.1]), tokens)
    assert all(part.isfinite().all() for part in parts(merged))


@every_kind
@every_merger
def test_merging_keeps_shapes_and_dtype(merger: Merger, kind: str) -> None:
    members, tokens = group_of(kind, dtype=torch.bfloat16), tokens_of(dtype=torch.bfloat16)
    merged = merger(members, SHARES, tokens)
    wide = merger(members.map(lambda part: part.float()), SHARES, tokens)
    for part, member, exact in zip(parts(merged), parts(members), parts(wide), strict=True):
        assert part.shape == exact.shape == (1, *member.shape[1:])
        assert part.dtype == torch.bfloat16
        assert exact.dtype == torch.float32
        torch.testing.assert_close(part, exact.bfloat16())


@every_merger
def test_what_is_merged_stays_as_it_was(merger: Merger) -> None:
    members, weights, tokens = group_of(), SHARES.clone(), tokens_of()
    merger(members, weights, tokens)
    assert_same(members, group_of(), tolerance=0)
    assert torch.equal(weights, SHARES)
    assert torch.equal(tokens.gates, tokens_of().gates)


@every_merger
def test_only_ratios_of_the_weights_count(merger: Merger) -> None:
    members, tokens = group_of(), tokens_of()
    expected = merger(members, SHARES, tokens)
    assert_same(merger(members, 1000 * SHARES.double(), tokens), expected, tolerance=2e-5)


@every_merger
def test_tokens_are_asked_for_where_they_are_needed(merger: Merger) -> None:
    if merger.needs_tokens:
        with pytest.raises(ValueError, match="is fitted on calibration tokens; give it"):
            merger(group_of(), SHARES)
    else:
        merged = merger(group_of(), SHARES, None)
        assert_same(merged, merger(group_of(), SHARES, tokens_of()), tolerance=0)


@every_merger
def test_weights_below_zero_are_refused(merger: Merger) -> None:
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="give each member 0 or more"):
            merger(group_of(), torch.tensor([1.0, wrong, 1.0]), tokens_of())


def test_the_heaviest_member_and_of_equals_the_first_is_dominant() -> None:
    members = group_of()
    for weights, expected in (([1.0, 3.0, 2.0], 1), ([1.0, 2.0, 2.0], 1), ([0.0, 0.0, 0.0], 0)):
        merged = Dominant()(members, torch.tensor(weights))
        assert_same(merged, members.select(torch.tensor([expected])), tolerance=0)


def test_tokens_are_parted_by_the_member_they_visit() -> None:
    gates = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.2, 0.3], [0.0, 0.9]])
    tokens = GroupTokens(torch.arange(4.0).unsqueeze(1), gates, swiglu)
    assert tokens.routed().states.flatten().tolist() == [0, 2, 3]
    assert tokens.visiting(1).states.flatten().tolist() == [2, 3]
    assert torch.equal(tokens.visiting(1).gates, gates[2:])


def test_blocks_of_tokens_are_all_tokens_in_order() -> None:
    states, gates = torch.arange(10_000.0).unsqueeze(1), torch.arange(10_000.0).unsqueeze(1)
    blocks = list(GroupTokens(states, gates, swiglu).blocks())
    assert len(blocks) > 1
    assert torch.equal(torch.cat([block.states for block in blocks]), states)
    assert torch.equal(torch.cat([block.gates for block in blocks]), gates)


@pytest.mark.parametrize("merger", AVERAGES, ids=str)
def test_full_rank_merging_is_the_weighted_mean_of_a_loop(merger: Merger) -> None:
    members = group_of()
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    merged = merger(members, weights, tokens_of())
    for mean, part in zip(parts(merged), parts(members), strict=True):
        expected = (1 * part[0] + 2 * part[1] + 5 * part[2]) / 8
        torch.testing.assert_close(mean, expected.unsqueeze(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("merger", [Average(), UnionSVD(rank=2)], ids=str)
def test_weights_that_are_all_zero_count_as_equal(merger: Merger) -> None:
    members = group_of()
    assert_same(merger(members, torch.zeros(3)), merger(members, torch.ones(3)))


def test_half_precision_is_mixed_in_float32() -> None:
    members = group_of(dtype=torch.bfloat16)
    wide = Average()(members.map(lambda tensor: tensor.float()), torch.ones(3))
    assert_same(Average()(members, torch.ones(3)), wide.map(lambda t: t.bfloat16()), tolerance=0)


def test_a_rank_that_covers_all_rows_is_the_average() -> None:
    members, weights = group_of(), torch.tensor([1.0, 2.0, 5.0])
    full = UnionSVD(rank=8)(members, weights)
    assert_same(full, Average()(members, weights), tolerance=0)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_low_rank_merging_is_the_formula_of_the_paper(rank: int) -> None:
    members, weights = group_of(), torch.tensor([1.0, 2.0, 5.0])
    merged = UnionSVD(rank)(members, weights)
    for name in ("gate_proj", "up_proj", "down_proj"):
        matrices = getattr(members, name)
        u, s, v = torch.linalg.svd(torch.cat(list(matrices), dim=1), full_matrices=False)
        blocks = v[:rank].chunk(3, dim=1)
        merged_v = (1 * blocks[0] + 2 * blocks[1] + 5 * blocks[2]) / 8
        expected = u[:, :rank] @ torch.diag(s[:rank]) @ merged_v
        torch.testing.assert_close(getattr(merged, name)[0], expected, rtol=0, atol=1e-5)
    mean = Average()(members, weights)
    assert merged.up_bias is not None
    assert mean.up_bias is not None
    assert torch.equal(merged.up_bias, mean.up_bias)


@pytest.mark.parametrize("merger", [UnionSVD, WhitenedUnionSVD])
def test_a_rank_below_one_is_refused(merger: type[UnionSVD | WhitenedUnionSVD]) -> None:
    with pytest.raises(ValueError, match="rank=0 keeps nothing"):
        merger(rank=0)
