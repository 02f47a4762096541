"""Recipes on sums made by hand: ties, blocks of a router, shares."""

import pytest
import torch
from torch import Tensor

from lightning_smoe.compression.recipe import Merge, Prune, Recipe
from lightning_smoe.functional.clustering import Agglomerative, Clusterer, GateMassWard, KMeans
from lightning_smoe.functional.distance import MeanOutput, Output, RouterLogit, TokenCosine
from lightning_smoe.functional.merging import Average, UnionSVD
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import LogSumExp, MeanRows, Slice
from lightning_smoe.functional.saliency import Frequency, GateMass, Reap, ReapSum, Saliency
from lightning_smoe.functional.sums import ExpertSums

ONE_BLOCK = torch.zeros(6, dtype=torch.int64)
TWO_BLOCKS = torch.tensor([0, 0, 0, 1, 1, 1])
CLUSTERERS = [Agglomerative(), Agglomerative("single"), KMeans(), GateMassWard()]
SALIENCIES = [Frequency(), GateMass(), Reap(), ReapSum()]


def sums_of(count: list[int], points: Tensor | None = None) -> ExpertSums:
    """Sums in which an expert's gates, norms and mean output follow from count and point."""
    counts = torch.tensor(count)
    wide = counts.double()
    if points is None:
        points = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    points = points.double()
    return ExpertSums(
        num_tokens=torch.tensor(10),
        count=counts,
        gate_sum=wide / 2,
        output_norm_sum=wide,
        gated_norm_sum=wide * wide,
        logit_gram=points @ points.T,
        output_sum=10 * points,
        output_gram=10 * points @ points.T,
        output_cosine=10 * torch.eye(6, dtype=torch.float64),
    )


@pytest.mark.parametrize("saliency", SALIENCIES, ids=str)
def test_of_equal_experts_the_first_stay(saliency: Saliency) -> None:
    assignment, shares = Prune(saliency)(sums_of([3, 7, 3, 3, 7, 3]), ONE_BLOCK, 4)
    assert assignment.tolist() == [0, 1, 2, -1, 3, -1]
    assert shares.tolist() == [1] * 6


@pytest.mark.parametrize("saliency", SALIENCIES, ids=str)
def test_experts_that_no_token_visits_go_first(saliency: Saliency) -> None:
    assignment, _ = Prune(saliency)(sums_of([0, 4, 0, 2, 0, 1]), ONE_BLOCK, 3)
    assert assignment.tolist() == [-1, 0, -1, 1, -1, 2]


def test_each_block_of_a_router_keeps_its_own_best() -> None:
    assignment, _ = Prune()(sums_of([9, 8, 7, 1, 2, 3]), TWO_BLOCKS, 4)
    assert assignment.tolist() == [0, 1, -1, -1, 2, 3]


@pytest.mark.parametrize("clusterer", CLUSTERERS, ids=str)
@pytest.mark.parametrize("num_groups", range(1, 7))
def test_merging_gives_every_expert_one_of_exactly_so_many_slots(
    clusterer: Clusterer, num_groups: int
) -> None:
    recipe = Merge(MeanOutput(), clusterer)
    assignment, _ = recipe(sums_of([3, 0, 5, 2, 9, 1]), ONE_BLOCK, num_groups)
    assert sorted(set(assignment.tolist())) == list(range(num_groups))


@pytest.mark.parametrize("clusterer", CLUSTERERS, ids=str)
def test_merging_never_joins_two_blocks(clusterer: Clusterer) -> None:
    # Experts are pairs across the blocks: without blocks 0 would join 3, 1 join 4, 2 join 5.
    points = torch.tensor([[0.0, 0, 0], [5, 0, 0], [9, 9, 0]]).repeat(2, 1)
    across, _ = Merge(Output(), clusterer)(sums_of([4] * 6, points), ONE_BLOCK, 3)
    assert across.tolist() == [0, 1, 2, 0, 1, 2]
    within, _ = Merge(Output(), clusterer)(sums_of([4] * 6, points), TWO_BLOCKS, 4)
    assert within.tolist() == [0, 0, 1, 2, 2, 3]


@pytest.mark.parametrize("clusterer", CLUSTERERS, ids=str)
def test_experts_with_equal_outputs_are_merged_first(clusterer: Clusterer) -> None:
    points = 3 * torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    points[4] = points[1]
    assignment, _ = Merge(Output(), clusterer)(sums_of([4] * 6, points), ONE_BLOCK, 5)
    assert assignment.tolist() == [0, 1, 2, 3, 1, 4]


def test_shares_follow_the_criterion_or_are_equal() -> None:
    sums = sums_of([3, 0, 5, 2, 9, 1])
    assert Merge(weights=GateMass())(sums, ONE_BLOCK, 3)[1].tolist() == sums.gate_sum.tolist()
    assert Merge(weights=None)(sums, ONE_BLOCK, 3)[1].tolist() == [1] * 6


@pytest.mark.parametrize(
    ("recipe", "needed"),
    [
        (Prune(), False),
        (Merge(MeanOutput()), True),
        (Merge(Output()), True),
        (Merge(TokenCosine()), True),
        (Merge(RouterLogit()), False),
    ],
    ids=str,
)
def test_all_experts_are_needed_where_outputs_are_compared(recipe: Recipe, needed: bool) -> None:
    assert recipe.needs_all_experts == needed


def test_pruning_is_carried_out_without_merging() -> None:
    assert Prune(refit=None).execution == (Slice(), Average(), False, None)
    assert Prune(refit=Refit(0.3)).execution[3] == Refit(0.3)


def test_merging_is_carried_out_as_set() -> None:
    recipe = Merge(merger=UnionSVD(4), align=False, router=MeanRows(), refit=None)
    assert recipe.execution == (MeanRows(), UnionSVD(4), False, None)
    assert Merge().execution == (LogSumExp(), Average(), True, Refit())
