"""Laws that every clusterer keeps; hierarchical ones against greedy loops and scipy."""

import time

import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from lightning_smoe.functional.centroids import DominantAssignment, PseudoPruning
from lightning_smoe.functional.clustering import Agglomerative, Clusterer, GateMassWard
from lightning_smoe.functional.kmeans import KMeans, SphericalKMeans
from tests.functional.partitions import (
    cosine_distances,
    distances,
    greedy,
    ones,
    partition,
    points,
    random_mass,
)

ALL = [
    Agglomerative(),
    Agglomerative("complete"),
    Agglomerative("single"),
    Agglomerative("ward"),
    KMeans(num_starts=2),
    KMeans(num_starts=2, points="similarity_rows"),
    SphericalKMeans(num_starts=2),
    GateMassWard(),
    DominantAssignment(),
    PseudoPruning(),
]


def distances_for(clusterer: Clusterer, at: Tensor) -> Tensor:
    return cosine_distances(at) if isinstance(clusterer, SphericalKMeans) else distances(at)


@pytest.mark.parametrize("num_groups", range(1, 13))
@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_groups_are_numbered_by_first_appearance_and_none_is_empty(
    clusterer: Clusterer, num_groups: int
) -> None:
    labels = clusterer(distances_for(clusterer, points()), random_mass(), num_groups).tolist()
    assert list(dict.fromkeys(labels)) == list(range(num_groups))


@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_as_many_groups_as_experts_leave_each_alone(clusterer: Clusterer) -> None:
    labels = clusterer(distances_for(clusterer, points()), random_mass(), 12)
    assert labels.tolist() == list(range(12))


@pytest.mark.parametrize("num_groups", [2, 5, 9])
@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_the_order_of_the_experts_does_not_matter(clusterer: Clusterer, num_groups: int) -> None:
    distance, mass = distances_for(clusterer, points()), random_mass()
    labels = clusterer(distance, mass, num_groups)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(num_groups))
    shuffled = clusterer(distance[order][:, order], mass[order], num_groups)
    assert partition(shuffled.tolist()) == partition(labels[order].tolist())


@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_experts_that_are_all_the_same_still_fill_every_group(clusterer: Clusterer) -> None:
    labels = clusterer(torch.zeros(6, 6, dtype=torch.float64), ones(6), 4)
    assert labels.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_duplicates_still_fill_every_group(clusterer: Clusterer) -> None:
    twice = torch.cat([points(4), points(4)])
    labels = clusterer(distances_for(clusterer, twice), ones(8), 6)
    assert labels.unique().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("clusterer", [*ALL[:-1], PseudoPruning(capacity=3)], ids=str)
def test_well_separated_experts_are_told_apart(clusterer: Clusterer) -> None:
    centers = 100 * points(3, seed=5)
    at = centers[[0, 1, 2, 2, 1, 0, 0, 1]] + points(8)
    # Heaviest, and so the centroids of those who look at mass, are one of each kind.
    mass = torch.tensor([9, 9, 9, 1, 1, 1, 1, 1], dtype=torch.float64)
    labels = clusterer(distances_for(clusterer, at), mass, 3)
    assert labels.tolist() == [0, 1, 2, 2, 1, 0, 0, 1]


@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_a_single_expert_is_one_group(clusterer: Clusterer) -> None:
    assert clusterer(torch.zeros(1, 1, dtype=torch.float64), ones(1), 1).tolist() == [0]


@pytest.mark.parametrize("num_groups", [0, 13])
@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_impossible_numbers_of_groups_are_refused(clusterer: Clusterer, num_groups: int) -> None:
    with pytest.raises(ValueError, match="impossible with 12 experts; take 1 to 12"):
        clusterer(distances_for(clusterer, points()), ones(12), num_groups)


@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_inputs_are_left_as_they_were(clusterer: Clusterer) -> None:
    distance, mass = distances_for(clusterer, points()), random_mass()
    clusterer(distance, mass, 4)
    assert torch.equal(distance, distances_for(clusterer, points()))
    assert torch.equal(mass, random_mass())


@pytest.mark.parametrize("clusterer", ALL, ids=str)
def test_128_experts_take_no_time(clusterer: Clusterer) -> None:
    distance, mass = distances_for(clusterer, points(128)), random_mass(128)
    clusterer(distance[:8, :8], mass[:8], 4)  # Imports are not counted.
    start = time.process_time()
    clusterer(distance, mass, 64)
    # A hundredth of a second, or two for K-means; a cubic search in Python takes seconds.
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("num_groups", [3, 6, 9])
def test_average_linkage_equals_a_greedy_loop(num_groups: int) -> None:
    distance = distances(points())

    def cost(a: list[int], b: list[int]) -> float:
        return float(distance[a][:, b].mean())

    labels = Agglomerative()(distance, ones(12), num_groups).tolist()
    assert partition(labels) == greedy(12, num_groups, cost)


@pytest.mark.parametrize("num_groups", [2, 5, 9])
def test_ward_linkage_equals_a_greedy_loop(num_groups: int) -> None:
    at = points()

    def cost(a: list[int], b: list[int]) -> float:
        apart = (at[a].mean(0) - at[b].mean(0)).square().sum()
        return len(a) * len(b) / (len(a) + len(b)) * float(apart)

    labels = Agglomerative("ward")(distances(at), ones(12), num_groups).tolist()
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
