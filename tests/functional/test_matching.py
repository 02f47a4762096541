"""Matching against trying all ways."""

from itertools import combinations

import pytest
import torch

from lightning_smoe.functional.matching import cheapest_pairs, cheapest_sets


def random_costs(size: int, seed: int = 0) -> torch.Tensor:
    cost = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    return cost + cost.T


def cheapest_of_all(cost: torch.Tensor, num_pairs: int) -> float:
    edges = list(combinations(range(len(cost)), 2))
    disjoint = (
        chosen
        for chosen in combinations(edges, num_pairs)
        if len({end for edge in chosen for end in edge}) == 2 * num_pairs
    )
    return min(sum(float(cost[edge]) for edge in chosen) for chosen in disjoint)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_pairs", [1, 2, 3])
def test_the_pairs_are_the_cheapest_of_all(num_pairs: int, seed: int) -> None:
    cost = random_costs(7, seed)
    pairs = cheapest_pairs(cost, num_pairs)
    assert len(pairs) == num_pairs
    assert len({end for pair in pairs for end in pair}) == 2 * num_pairs
    found = sum(float(cost[pair]) for pair in pairs)
    assert found == pytest.approx(cheapest_of_all(cost, num_pairs), abs=1e-9)


def test_the_order_of_the_indices_does_not_matter() -> None:
    cost, order = random_costs(12), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    pairs = {frozenset(pair) for pair in cheapest_pairs(cost, 5)}
    moved = cheapest_pairs(cost[order][:, order], 5)
    assert {frozenset(order[list(pair)].tolist()) for pair in moved} == pairs


def test_the_scale_of_the_costs_does_not_matter() -> None:
    cost = random_costs(12)
    assert cheapest_pairs(cost * 1e-12, 6) == cheapest_pairs(cost * 1e12, 6)


def test_costs_that_are_all_zero_still_give_pairs() -> None:
    assert len(cheapest_pairs(torch.zeros(6, 6, dtype=torch.float64), 3)) == 3


def test_no_pairs_need_no_costs() -> None:
    assert cheapest_pairs(torch.full((4, 4), torch.nan, dtype=torch.float64), 0) == []


def test_too_many_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_pairs=3 is impossible among 5; take 0 to 2"):
        cheapest_pairs(random_costs(5), 3)


def test_a_cost_that_is_no_number_is_refused() -> None:
    cost = random_costs(4)
    cost[0, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        cheapest_pairs(cost, 2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_sets", range(6))
def test_the_sets_are_the_cheapest_of_all(num_sets: int, seed: int) -> None:
    sets = [*((index,) for index in range(5)), *combinations(range(5), 2)]
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randn(len(sets), generator=generator, dtype=torch.float64).tolist()
    found = cheapest_sets(sets, cost, num_sets)
    assert len(found) == num_sets
    indices = [index for place in found for index in sets[place]]
    assert len(set(indices)) == len(indices)
    best = min(
        sum(cost[place] for place in chosen)
        for chosen in combinations(range(len(sets)), num_sets)
        if len({i for place in chosen for i in sets[place]}) == sum(len(sets[p]) for p in chosen)
    )
    assert sum(cost[place] for place in found) == pytest.approx(best, abs=1e-9)


def test_more_sets_than_can_be_disjoint_are_refused() -> None:
    with pytest.raises(ValueError, match="4 disjoint sets were asked for among 3"):
        cheapest_sets([(0,), (1,), (2,)], [1.0] * 3, 4)
    with pytest.raises(ValueError, match="no matching was found"):
        cheapest_sets([(0, 1), (1, 2), (0, 2)], [1.0] * 3, 2)
