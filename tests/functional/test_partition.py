"""Numbering, empty groups and mass."""

import torch

from lightning_smoe.functional.partition import (
    canonical_order,
    fill_empty_groups,
    numbered,
    positive_mass,
)
from tests.functional.partitions import distances, points


def test_groups_are_numbered_by_first_appearance() -> None:
    assert numbered(torch.tensor([7, 2, 7, 5])).tolist() == [0, 1, 0, 2]


def test_the_canonical_order_does_not_depend_on_numbering() -> None:
    at, shuffle = points(12), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    first = at[canonical_order(distances(at))]
    assert torch.equal(first, at[shuffle][canonical_order(distances(at[shuffle]))])


def test_the_canonical_order_begins_in_the_middle() -> None:
    at = torch.tensor([[0.0], [1.0], [9.0], [5.0]], dtype=torch.float64)
    assert canonical_order(distances(at)).tolist() == [1, 3, 0, 2]


def test_an_empty_group_gets_the_outlier_of_the_largest() -> None:
    at = torch.tensor([[0.0], [1.0], [9.0], [5.0], [5.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 2, 2])
    assert fill_empty_groups(labels, distances(at), 3).tolist() == [0, 0, 1, 2, 2]


def test_mass_becomes_positive_and_keeps_its_ratios() -> None:
    mass = positive_mass(torch.tensor([2.0, 0.0, 8.0], dtype=torch.float64))
    assert mass[[0, 2]].tolist() == [0.25, 1.0]
    assert 0 < mass[1] < 1e-9


def test_no_mass_at_all_is_equal_mass() -> None:
    assert positive_mass(torch.zeros(3, dtype=torch.float64)).tolist() == [1.0, 1.0, 1.0]
