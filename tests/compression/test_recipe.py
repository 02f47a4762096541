"""Recipes on evidence made by hand: ties, experts that stay alone, shares."""

from dataclasses import replace

import pytest
import torch

from lightning_smoe.compression.recipe import Execution, Merge, Prune, Recipe
from lightning_smoe.functional.alignment import ByActivations, ByWeights
from lightning_smoe.functional.clustering import Agglomerative, Clusterer, GateMassWard
from lightning_smoe.functional.distance import MeanOutput, Output
from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.grouping import Clustered, Grouper
from lightning_smoe.functional.kmeans import KMeans
from lightning_smoe.functional.merging import Average, UnionSVD
from lightning_smoe.functional.pooled_matching import PooledMatching
from lightning_smoe.functional.pooling import NeuronPool
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import LogSumExp, MeanRows, Slice
from lightning_smoe.functional.router_rows import Map
from lightning_smoe.functional.saliency import Frequency, GateMass, Reap, ReapSum, Saliency
from tests.functional.layers import evidence_of, random_weights

NONE = torch.zeros(6, dtype=torch.bool)
GROUPERS: list[Grouper] = [
    *[Clustered(Output(), c) for c in (Agglomerative(), KMeans(), GateMassWard())],
    Clustered(MeanOutput(), Agglomerative("single")),
    PooledMatching(),
]
SALIENCIES = [Frequency(), GateMass(), Reap(), ReapSum()]


def alone(*experts: int) -> torch.Tensor:
    """Marks experts that stay as they are."""
    return torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(experts), True)


def counted(count: list[int]) -> Evidence:
    """Evidence in which gates and norms of experts follow from how often they were selected."""
    evidence = evidence_of(random_weights())
    counts = torch.tensor(count)
    wide = counts.double()
    sums = replace(
        evidence.sums,
        count=counts,
        gate_sum=wide / 2,
        output_norm_sum=wide,
        gated_norm_sum=wide * wide,
    )
    return replace(evidence, sums=sums)


def copied(source: int, target: int) -> Evidence:
    """Evidence of experts two of which are equal."""
    order = torch.arange(6)
    order[target] = source
    weights: ExpertWeights = random_weights().select(order)
    return evidence_of(weights)


@pytest.mark.parametrize("saliency", SALIENCIES, ids=str)
def test_of_equal_experts_the_first_stay(saliency: Saliency) -> None:
    assignment, shares = Prune(saliency)(counted([3, 7, 3, 3, 7, 3]), 4, NONE)
    assert assignment.tolist() == [0, 1, 2, -1, 3, -1]
    assert shares.tolist() == [1] * 6


@pytest.mark.parametrize("saliency", SALIENCIES, ids=str)
def test_experts_that_no_token_visits_go_first(saliency: Saliency) -> None:
    assignment, _ = Prune(saliency)(counted([0, 4, 0, 2, 0, 1]), 3, NONE)
    assert assignment.tolist() == [-1, 0, -1, 1, -1, 2]


def test_pruning_keeps_experts_that_stay_alone_whatever_their_saliency() -> None:
    evidence = counted([9, 8, 7, 6, 0, 5])
    assert Prune()(evidence, 3, NONE)[0].tolist() == [0, 1, 2, -1, -1, -1]
    assert Prune()(evidence, 3, alone(4))[0].tolist() == [0, 1, -1, -1, 2, -1]
    assert Prune()(evidence, 2, alone(3, 4, 5))[0].tolist() == [-1, -1, -1, 0, 1, -1]


@pytest.mark.parametrize("grouper", GROUPERS, ids=lambda each: str(each)[:60])
@pytest.mark.parametrize("num_groups", range(1, 7))
def test_merging_gives_every_expert_one_of_exactly_so_many_slots(
    grouper: Grouper, num_groups: int
) -> None:
    assignment, _ = Merge(grouper)(evidence_of(random_weights()), num_groups, NONE)
    assert sorted(set(assignment.tolist())) == list(range(num_groups))


@pytest.mark.parametrize("grouper", GROUPERS, ids=lambda each: str(each)[:60])
@pytest.mark.parametrize("single", [[0], [2, 5], [1, 3, 4]], ids=str)
def test_experts_that_stay_alone_have_a_slot_of_their_own(
    grouper: Grouper, single: list[int]
) -> None:
    # Their best partners are copies of them.
    evidence = copied(single[0], 5 if single[0] != 5 and 5 not in single else 1)
    assignment, _ = Merge(grouper)(evidence, 4, alone(*single))
    found = assignment.tolist()
    assert sorted(set(found)) == [0, 1, 2, 3]
    for expert in single:
        assert found.count(found[expert]) == 1


def test_where_more_experts_are_to_stay_alone_than_there_are_slots_none_is() -> None:
    evidence, recipe = copied(1, 4), Merge(PooledMatching())
    for single in (alone(1, 2, 4), alone(0, 1, 2, 3, 4)):
        assert torch.equal(recipe(evidence, 3, single)[0], recipe(evidence, 3, NONE)[0])


@pytest.mark.parametrize("grouper", GROUPERS, ids=lambda each: str(each)[:60])
def test_equal_experts_are_merged_first(grouper: Grouper) -> None:
    assignment, _ = Merge(grouper)(copied(1, 4), 5, NONE)
    assert assignment.tolist() == [0, 1, 2, 3, 1, 4]


@pytest.mark.parametrize("clusterer", [Agglomerative(), KMeans(), GateMassWard()], ids=str)
def test_groups_without_traffic_give_no_nan(clusterer: Clusterer) -> None:
    evidence = counted([0] * 6)
    for recipe in (
        Merge(Clustered(Output(), clusterer), Frequency()),
        Merge(Clustered(MeanOutput(), clusterer), Frequency()),
    ):
        assignment, shares = recipe(evidence, 3, NONE)
        assert sorted(set(assignment.tolist())) == [0, 1, 2]
        assert shares.tolist() == [0] * 6
    assert Prune()(evidence, 3, NONE)[0].tolist() == [0, 1, 2, -1, -1, -1]


def test_shares_follow_the_criterion_or_are_equal() -> None:
    evidence = counted([3, 0, 5, 2, 9, 1])
    shares = Merge(weights=GateMass())(evidence, 3, NONE)[1]
    assert shares.tolist() == evidence.sums.gate_sum.tolist()
    # Shares of experts that stay alone are theirs too.
    assert torch.equal(Merge(weights=GateMass())(evidence, 3, alone(4))[1], shares)
    assert Merge(weights=None)(evidence, 3, NONE)[1].tolist() == [1] * 6


def test_a_recipe_is_carried_out_as_set() -> None:
    assert Prune(refit=None).execution == Execution(Slice(), Average(), None, None)
    assert Prune(refit=Refit(0.3)).execution.refit == Refit(0.3)
    recipe = Merge(merger=UnionSVD(4), alignment=ByActivations(), router=MeanRows(), refit=None)
    assert recipe.execution == Execution(MeanRows(), UnionSVD(4), ByActivations(), None)
    merged = Merge(Clustered(), Frequency(), Average(), ByWeights(), LogSumExp())
    assert merged.execution == Execution(LogSumExp(), Average(), ByWeights(), Refit())
    # As it stands it is matched neuron pooling.
    assert Merge() == Merge(PooledMatching(), None, NeuronPool(), None, Map(), Refit())
    assert Merge().execution == Execution(Map(), NeuronPool(), None, Refit())


@pytest.mark.parametrize("recipe", [Prune(), Merge()], ids=["prune", "merge"])
def test_super_experts_are_protected_unless_it_is_switched_off(recipe: Recipe) -> None:
    assert recipe.protects_super_experts
    assert not type(recipe)(protect=False).protects_super_experts  # type: ignore[call-arg]  # both have it
