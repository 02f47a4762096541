"""Clusterers against greedy loops, scipy, and each other."""

import time
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from lightning_smoe.functional.clustering import (
    Agglomerative,
    Clusterer,
    GateMassWard,
    KMeans,
    _coordinates,
)

ALL = [
    Agglomerative(),
    Agglomerative("complete"),
    Agglomerative("single"),
    KMeans(num_starts=2),
    GateMassWard(),
]
Partition = set[frozenset[int]]


def points(num_experts: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_experts, 4, generator=generator, dtype=torch.float64)


def random_mass(num_experts: int = 12, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_experts, generator=generator, dtype=torch.float64)


def ones(num_experts: int) -> Tensor:
    return torch.ones(num_experts, dtype=torch.float64)


def distances(at: Tensor) -> Tensor:
    return torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist")


def partition(labels: list[int]) -> Partition:
    return {frozenset(i for i, x in enumerate(labels) if x == label) for label in labels}


def greedy(
    num_experts: int, num_groups: int, cost: Callable[[list[int], list[int]], float]
) -> Partition:
    """Merges the cheapest two groups until few enough are left."""
    groups = [[expert] for expert in range(num_experts)]
    while len(groups) > num_groups:
        a, b = min(combinations(groups, 2), key=lambda pair: cost(*pair))
        groups = [group for group in groups if group not in (a, b)] + [a + b]
    return {frozenset(group) for group in groups}


@pytest.mark.parametrize("num_groups", range(1, 13))
@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_groups_are_numbered_by_first_appearance_and_none_is_empty(
    clusterer: Clusterer, num_groups: int
) -> None:
    labels = clusterer(distances(points()), random_mass(), num_groups).tolist()
    assert list(dict.fromkeys(labels)) == list(range(num_groups))


@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_experts_that_are_all_the_same_still_fill_every_group(clusterer: Clusterer) -> None:
    labels = clusterer(torch.zeros(6, 6, dtype=torch.float64), ones(6), 4)
    assert labels.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_duplicates_still_fill_every_group(clusterer: Clusterer) -> None:
    twice = torch.cat([points(4), points(4)])
    labels = clusterer(distances(twice), ones(8), 6)
    assert labels.unique().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_well_separated_experts_are_told_apart(clusterer: Clusterer) -> None:
    centers = 100 * points(3, seed=5)
    at = centers[[0, 1, 2, 2, 1, 0, 0, 1]] + points(8)
    labels = clusterer(distances(at), ones(8), 3)
    assert labels.tolist() == [0, 1, 2, 2, 1, 0, 0, 1]


@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_a_single_expert_is_one_group(clusterer: Clusterer) -> None:
    assert clusterer(torch.zeros(1, 1, dtype=torch.float64), ones(1), 1).tolist() == [0]


@pytest.mark.parametrize("num_groups", [0, 13])
@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_impossible_numbers_of_groups_are_refused(clusterer: Clusterer, num_groups: int) -> None:
    with pytest.raises(ValueError, match="impossible with 12 experts; take 1 to 12"):
        clusterer(distances(points()), ones(12), num_groups)


@pytest.mark.parametrize("num_groups", [3, 6, 9])
def test_average_linkage_equals_a_greedy_loop(num_groups: int) -> None:
    distance = distances(points())

    def cost(a: list[int], b: list[int]) -> float:
        return float(distance[a][:, b].mean())

    labels = Agglomerative()(distance, ones(12), num_groups).tolist()
    assert partition(labels) == greedy(12, num_groups, cost)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_groups", [2, 5, 9])
def test_gate_mass_ward_equals_a_greedy_loop(seed: int, num_groups: int) -> None:
    at, mass = points(seed=seed), random_mass(seed=seed)

    def mean(group: list[int]) -> Tensor:
        return (mass[group].unsqueeze(1) * at[group]).sum(0) / mass[group].sum()

    def cost(a: list[int], b: list[int]) -> float:
        m_a, m_b = float(mass[a].sum()), float(mass[b].sum())
        return m_a * m_b / (m_a + m_b) * float((mean(a) - mean(b)).norm()) ** 2

    labels = GateMassWard()(distances(at), mass, num_groups).tolist()
    assert partition(labels) == greedy(12, num_groups, cost)


@pytest.mark.parametrize("num_groups", [2, 10, 25, 39])
def test_gate_mass_ward_with_equal_mass_is_ward(num_groups: int) -> None:
    at = points(40)
    scipy_labels = fcluster(linkage(at.numpy(), "ward"), num_groups, "maxclust").tolist()
    labels = GateMassWard()(distances(at), 3 * ones(40), num_groups).tolist()
    assert partition(labels) == partition(scipy_labels)


def test_experts_without_mass_join_others_and_change_nothing_else() -> None:
    at, mass = points(12), random_mass(8)
    padded = torch.cat([mass, torch.zeros(4, dtype=torch.float64)])
    with_them = GateMassWard()(distances(at), padded, 5).tolist()
    without = GateMassWard()(distances(at[:8]), mass, 5).tolist()
    assert with_them[:8] == without


def test_gate_mass_ward_without_any_mass_is_ward() -> None:
    distance = distances(points())
    labels = GateMassWard()(distance, 0 * ones(12), 4)
    assert torch.equal(labels, GateMassWard()(distance, ones(12), 4))


def test_gate_mass_ward_of_128_experts_takes_no_time() -> None:
    distance, mass = distances(points(128)), random_mass(128)
    start = time.process_time()
    GateMassWard()(distance, mass, 64)
    # A cubic search takes seconds; a tenth of that leaves room for a busy machine.
    assert time.process_time() - start < 0.5


def test_inputs_are_left_as_they_were() -> None:
    distance, mass = distances(points()), random_mass()
    for clusterer in ALL:
        clusterer(distance, mass, 4)
    assert torch.equal(distance, distances(points()))
    assert torch.equal(mass, random_mass())


def test_classical_scaling_reproduces_distances_of_points() -> None:
    distance = distances(points())
    torch.testing.assert_close(distances(_coordinates(distance)), distance, rtol=0, atol=1e-7)


def test_kmeans_finds_the_tightest_of_all_partitions() -> None:
    at = points(7)

    def spread(labels: list[int]) -> float:
        groups = [at[list(group)] for group in partition(labels)]
        return sum(float((group - group.mean(0)).square().sum()) for group in groups)

    found = KMeans(num_starts=50)(distances(at), ones(7), 2).tolist()
    every = [[number >> expert & 1 for expert in range(7)] for number in range(1, 64)]
    assert spread(found) == pytest.approx(min(spread(labels) for labels in every))


def test_kmeans_with_the_same_seed_gives_the_same_groups() -> None:
    distance = distances(points(20))
    first = KMeans(num_starts=1, seed=3)(distance, ones(20), 7)
    assert torch.equal(first, KMeans(num_starts=1, seed=3)(distance, ones(20), 7))


def test_kmeans_without_starts_is_refused() -> None:
    with pytest.raises(ValueError, match="num_starts=0 tries nothing"):
        KMeans(num_starts=0)
