"""Groups around the heaviest experts, against loops that follow the papers."""

import pytest
import torch

from lightning_smoe.functional.centroids import DominantAssignment, PseudoPruning
from tests.functional.partitions import distances, ones, partition, points, random_mass


@pytest.mark.parametrize("num_groups", [1, 4, 9])
def test_others_join_the_nearest_dominant_expert(num_groups: int) -> None:
    distance, mass = distances(points()), random_mass()
    dominant = sorted(range(12), key=lambda expert: -float(mass[expert]))[:num_groups]
    groups = {expert: {expert} for expert in dominant}
    for expert in range(12):
        nearest = min(dominant, key=lambda center: float(distance[expert, center]))
        groups[nearest].add(expert)
    labels = DominantAssignment()(distance, mass, num_groups).tolist()
    assert partition(labels) == {frozenset(group) for group in groups.values()}


@pytest.mark.parametrize(("num_groups", "capacity"), [(4, 3), (4, 4), (2, 16), (9, 2)])
def test_the_heaviest_take_their_nearest_until_full(num_groups: int, capacity: int) -> None:
    distance, mass = distances(points()), random_mass()
    by_mass = sorted(range(12), key=lambda expert: -float(mass[expert]))
    free, groups = by_mass[num_groups:], []
    for center in by_mass[:num_groups]:
        group = [center]
        while free and len(group) < capacity:
            nearest = min(free, key=lambda expert: float(distance[center, expert]))
            free.remove(nearest)
            group.append(nearest)
        groups.append(frozenset(group))
    labels = PseudoPruning(capacity)(distance, mass, num_groups).tolist()
    assert partition(labels) == set(groups)


def test_pseudo_pruning_leaves_most_of_the_kept_alone() -> None:
    labels = PseudoPruning(4)(distances(points()), random_mass(), 7)
    assert sorted(labels.bincount().tolist()) == [1, 1, 1, 1, 1, 3, 4]


def test_centroids_at_distance_zero_found_groups_of_their_own() -> None:
    nowhere = torch.zeros(5, 5, dtype=torch.float64)
    assert DominantAssignment()(nowhere, ones(5), 3).unique().tolist() == [0, 1, 2]
    assert PseudoPruning()(nowhere, ones(5), 3).unique().tolist() == [0, 1, 2]


def test_experts_that_cannot_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no room for 12 experts in 5 groups; raise it to 3"):
        PseudoPruning(2)(distances(points()), ones(12), 5)


def test_a_capacity_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity=1 lets no expert join"):
        PseudoPruning(1)
