"""Merging against loops, torch.linalg.svd and the laws any merge obeys."""

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.merging import Average, Merger, UnionSVD
from tests.weights import parts

ALL = [Average(), UnionSVD(), UnionSVD(rank=100)]


def random_experts(num_experts: int = 3, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(num_experts, *shape, generator=generator).to(dtype)

    return ExpertWeights(
        up_proj=draw(5, 6),
        down_proj=draw(6, 5),
        gate_proj=draw(5, 6),
        gate_bias=draw(5),
        up_bias=draw(5),
        down_bias=draw(6),
    )


def assert_same(actual: ExpertWeights, expected: ExpertWeights, tolerance: float = 1e-6) -> None:
    for ours, theirs in zip(parts(actual), parts(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("merger", ALL, ids=str)
def test_merging_equal_experts_gives_either(merger: Merger) -> None:
    expert = random_experts(1)
    members = expert.select(torch.tensor([0, 0, 0]))
    assert_same(merger(members, torch.tensor([0.2, 0.5, 0.1])), expert)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("merger", ALL, ids=str)
def test_merging_one_expert_changes_nothing(merger: Merger, dtype: torch.dtype) -> None:
    expert = random_experts(1, dtype)
    assert_same(merger(expert, torch.tensor([0.3])), expert, tolerance=0)


@pytest.mark.parametrize("merger", ALL, ids=str)
def test_full_rank_merging_is_the_weighted_mean_of_a_loop(merger: Merger) -> None:
    members = random_experts()
    merged = merger(members, torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    for mean, part in zip(parts(merged), parts(members), strict=True):
        expected = (1 * part[0] + 2 * part[1] + 5 * part[2]) / 8
        torch.testing.assert_close(mean, expected.unsqueeze(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("merger", [Average(), UnionSVD(rank=2)], ids=str)
def test_weights_that_are_all_zero_count_as_equal(merger: Merger) -> None:
    members = random_experts()
    assert_same(merger(members, torch.zeros(3)), merger(members, torch.ones(3)))


@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
def test_weights_below_zero_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="give each member 0 or more"):
        Average()(random_experts(), torch.tensor([1.0, wrong, 1.0]))


def test_half_precision_is_mixed_in_float32() -> None:
    members = random_experts(dtype=torch.bfloat16)
    wide = Average()(members.map(lambda tensor: tensor.float()), torch.ones(3))
    assert_same(Average()(members, torch.ones(3)), wide.map(lambda t: t.bfloat16()), tolerance=0)


def test_a_rank_that_covers_all_rows_is_the_average() -> None:
    members, weights = random_experts(), torch.tensor([1.0, 2.0, 5.0])
    full = UnionSVD(rank=6)(members, weights)
    assert_same(full, Average()(members, weights), tolerance=0)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_low_rank_merging_is_the_formula_of_the_paper(rank: int) -> None:
    members, weights = random_experts(), torch.tensor([1.0, 2.0, 5.0])
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


def test_low_rank_merging_keeps_the_dtype() -> None:
    merged = UnionSVD(rank=2)(random_experts(dtype=torch.bfloat16), torch.ones(3))
    assert {part.dtype for part in parts(merged)} == {torch.bfloat16}


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank=0 keeps nothing"):
        UnionSVD(rank=0)
