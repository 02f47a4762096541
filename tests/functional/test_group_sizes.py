"""Limited groups against the best of all assignments."""

from itertools import product

import pytest
import torch

from lightning_smoe.functional.group_sizes import GroupSizes, _assign, _medoids, fit_group_sizes
from tests.functional.partitions import distances, partition, points

# One large group, one of two, and one expert alone.
LOPSIDED = torch.tensor([0, 0, 0, 1, 0, 2, 0, 1])


def total(labels: list[int]) -> float:
    """Sum of the distances to the medoids of the groups."""
    distance = distances(points(8))
    found = 0.0
    for group in partition(labels):
        found += min(sum(float(distance[i, j]) for j in group) for i in group)
    return found


@pytest.mark.parametrize("sizes", [GroupSizes(1, 4), GroupSizes(1, 3), GroupSizes(2, 3)])
def test_sizes_are_kept_and_groups_stay_as_many(sizes: GroupSizes) -> None:
    held = fit_group_sizes(LOPSIDED, distances(points(8)), sizes).bincount()
    assert len(held) == 3
    assert sizes.smallest <= held.min()
    assert held.max() <= sizes.largest


def test_groups_that_keep_to_the_sizes_already_are_left_alone() -> None:
    labels = fit_group_sizes(LOPSIDED, distances(points(8)), GroupSizes(1, 5))
    assert torch.equal(labels, LOPSIDED)


def test_the_medoid_is_the_nearest_to_its_mates() -> None:
    at = torch.tensor([[0.0], [2.0], [5.0], [30.0], [31.0]], dtype=torch.float64)
    assert _medoids(torch.tensor([0, 0, 0, 1, 1]), distances(at)).tolist() == [1, 3]


@pytest.mark.parametrize("sizes", [GroupSizes(1, 4), GroupSizes(1, 3), GroupSizes(2, 3)])
def test_no_assignment_to_the_medoids_is_better(sizes: GroupSizes) -> None:
    distance, medoids = distances(points(8)), [1, 4, 6]

    def cost(labels: tuple[int, ...]) -> float:
        return sum(float(distance[i, medoids[group]]) for i, group in enumerate(labels))

    def allowed(labels: tuple[int, ...]) -> bool:
        held = [labels.count(group) for group in range(3)]
        return sizes.smallest <= min(held) and max(held) <= sizes.largest

    found = tuple(_assign(distance, torch.tensor(medoids), sizes).tolist())
    assert allowed(found)
    best = min(cost(labels) for labels in product(range(3), repeat=8) if allowed(labels))
    assert cost(found) == pytest.approx(best)


def test_reassigning_goes_on_while_it_helps() -> None:
    distance, sizes = distances(points(8)), GroupSizes(1, 3)
    first = _assign(distance, _medoids(LOPSIDED, distance), sizes).tolist()
    labels = fit_group_sizes(LOPSIDED, distance, sizes)
    assert total(labels.tolist()) <= total(first)
    again = _assign(distance, _medoids(labels, distance), sizes)
    assert total(again.tolist()) == pytest.approx(total(labels.tolist()))


def test_the_order_of_the_experts_does_not_matter() -> None:
    distance, order = distances(points(8)), torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])
    shuffled = fit_group_sizes(LOPSIDED[order], distance[order][:, order], GroupSizes(2, 3))
    labels = fit_group_sizes(LOPSIDED, distance, GroupSizes(2, 3))
    assert partition(shuffled.tolist()) == partition(labels[order].tolist())


def test_equal_sizes_differ_by_at_most_one() -> None:
    assert GroupSizes.equal(8, 3) == GroupSizes(2, 3)
    assert GroupSizes.equal(8, 4) == GroupSizes(2, 2)


def test_experts_that_are_all_the_same_can_be_spread() -> None:
    labels = fit_group_sizes(LOPSIDED, torch.zeros(8, 8, dtype=torch.float64), GroupSizes(2, 3))
    assert sorted(labels.bincount().tolist()) == [2, 3, 3]
