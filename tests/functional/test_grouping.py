"""Clustered groups, free and under limits."""

import pytest
import torch

from lightning_smoe.functional.centroids import PseudoPruning
from lightning_smoe.functional.clustering import Agglomerative, GateMassWard
from lightning_smoe.functional.distance import MeanOutput, Output
from lightning_smoe.functional.grouping import Clustered, Grouper
from lightning_smoe.functional.kmeans import KMeans
from lightning_smoe.functional.routed_greedy import RoutedGreedy
from lightning_smoe.functional.saliency import GateMass, Reap
from tests.functional.layers import evidence_of, random_weights

ALL: list[Grouper] = [
    Clustered(),
    Clustered(max_group_size=2),
    Clustered(equal_sizes=True),
    Clustered(MeanOutput("cosine"), KMeans(num_starts=1), equal_sizes=True),
    RoutedGreedy(),
]


@pytest.mark.parametrize("grouper", ALL, ids=str)
@pytest.mark.parametrize("num_groups", [3, 4, 5])
def test_groups_are_numbered_by_first_appearance_and_none_is_empty(
    grouper: Grouper, num_groups: int
) -> None:
    labels = grouper(evidence_of(random_weights()), num_groups).tolist()
    assert list(dict.fromkeys(labels)) == list(range(num_groups))


@pytest.mark.parametrize("grouper", ALL, ids=str)
def test_as_many_groups_as_experts_leave_each_alone(grouper: Grouper) -> None:
    assert grouper(evidence_of(random_weights()), 6).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("grouper", [Clustered(), Clustered(equal_sizes=True), RoutedGreedy()])
def test_one_group_holds_all(grouper: Grouper) -> None:
    assert grouper(evidence_of(random_weights()), 1).tolist() == [0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("grouper", ALL, ids=str)
def test_an_expert_that_no_token_visits_does_no_harm(grouper: Grouper) -> None:
    evidence = evidence_of(random_weights(), unvisited=2)
    assert grouper(evidence, 3).unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("num_groups", [0, 7])
@pytest.mark.parametrize("grouper", ALL, ids=str)
def test_impossible_numbers_of_groups_are_refused(grouper: Grouper, num_groups: int) -> None:
    with pytest.raises(ValueError, match="impossible with 6 experts; take 1 to 6"):
        grouper(evidence_of(random_weights()), num_groups)


def test_without_limits_the_clusterer_decides() -> None:
    evidence = evidence_of(random_weights())
    grouper = Clustered(Output(), PseudoPruning(capacity=5), Reap())
    expected = PseudoPruning(capacity=5)(Output()(evidence), Reap()(evidence), 2)
    assert torch.equal(grouper(evidence, 2), expected)
    wide = Clustered(Output(), PseudoPruning(capacity=5), Reap(), max_group_size=5)
    assert torch.equal(wide(evidence, 2), expected)


@pytest.mark.parametrize("clusterer", [GateMassWard(), Agglomerative("single"), PseudoPruning()])
def test_limits_hold_for_any_clusterer(
    clusterer: GateMassWard | Agglomerative | PseudoPruning,
) -> None:
    evidence = evidence_of(random_weights(num_experts=11))
    small = Clustered(clusterer=clusterer, max_group_size=3)(evidence, 5)
    equal = Clustered(clusterer=clusterer, equal_sizes=True)(evidence, 4)
    assert small.bincount().max() <= 3
    assert sorted(equal.bincount().tolist()) == [2, 3, 3, 3]


def test_limits_that_leave_no_room_are_refused() -> None:
    match = "max_group_size=2 leaves no room for 6 experts in 2 groups; raise it to 3 or more"
    with pytest.raises(ValueError, match=match):
        Clustered(max_group_size=2)(evidence_of(random_weights()), 2)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_group_size=0 leaves no room for an expert"):
        Clustered(mass=GateMass(), max_group_size=0)
