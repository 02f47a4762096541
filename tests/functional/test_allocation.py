"""Allocations against all that there are, curves against loops."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.allocation import (
    Counts,
    Limits,
    cheapest_counts,
    dropped_saliency,
    even_counts,
    falling_curve,
    greedy_counts,
    moves,
    spread_grid,
)

MANY = range(40)


def random_limits(seed: int) -> Limits:
    """Two to four layers with floors, ceilings and steps of their own."""
    draw = random.Random(seed)
    allowed = []
    for _ in range(draw.randint(2, 4)):
        step = draw.choice([1, 1, 2, 3])
        least = step * draw.randint(1, 2)
        allowed.append(range(least, least + step * draw.randint(0, 5) + 1, step))
    least = sum(numbers[0] for numbers in allowed)
    return Limits.within(allowed, draw.randint(least, sum(n[-1] for n in allowed)))


def random_costs(limits: Limits, seed: int) -> list[Tensor]:
    """Costs without any order."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.rand(len(numbers), generator=generator, dtype=torch.float64)
        for numbers in limits.allowed
    ]


def cost_of(counts: Counts, costs: list[Tensor], limits: Limits) -> float:
    places = (numbers.index(k) for numbers, k in zip(limits.allowed, counts, strict=True))
    return sum(float(cost[place]) for cost, place in zip(costs, places, strict=True))


def every_allocation(limits: Limits) -> list[Counts]:
    return [c for c in itertools.product(*limits.allowed) if sum(c) == limits.total]


@pytest.mark.parametrize("seed", MANY)
def test_the_cheapest_allocation_is_the_cheapest_of_all(seed: int) -> None:
    limits = random_limits(seed)
    costs = random_costs(limits, seed)
    found = cheapest_counts(costs, limits)
    assert found in every_allocation(limits)
    best = min(cost_of(counts, costs, limits) for counts in every_allocation(limits))
    assert cost_of(found, costs, limits) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", MANY)
def test_the_total_is_the_largest_that_can_be_had(seed: int) -> None:
    allowed = random_limits(seed).allowed
    sums = {sum(counts) for counts in itertools.product(*allowed)}
    for budget in range(min(sums), max(sums) + 3):
        assert Limits.within(allowed, budget).total == max(s for s in sums if s <= budget)


def test_less_than_all_layers_need_is_refused() -> None:
    with pytest.raises(ValueError, match="need 6 experts at least, and 5 are to stay"):
        Limits.within([range(2, 9), range(4, 9)], 5)


@pytest.mark.parametrize("seed", MANY)
def test_limits_say_where_there_is_no_choice(seed: int) -> None:
    limits = random_limits(seed)
    if limits.leave_no_choice:
        assert len(every_allocation(limits)) == 1


def test_even_counts_are_even() -> None:
    assert even_counts([60] * 4, Limits((range(4, 61),) * 4, 120)) == (30, 30, 30, 30)
    assert sorted(even_counts([60] * 4, Limits((range(4, 61),) * 4, 122))) == [30, 30, 31, 31]
    assert even_counts([60, 20], Limits((range(4, 61), range(4, 21)), 40)) == (30, 10)
    assert even_counts([60, 20], Limits((range(4, 61), range(14, 21)), 40)) == (26, 14)


@pytest.mark.parametrize("seed", MANY)
def test_greedy_takes_where_the_cost_would_be_lowest(seed: int) -> None:
    limits = Limits((range(2, 8),) * 3, 6 + seed % 16)
    costs = [cost.sort(descending=True).values for cost in random_costs(limits, seed)]
    table = {(i, k): float(costs[i][k - 2]) for i in range(3) for k in range(2, 8)}
    counts = [7, 7, 7]
    while sum(counts) > limits.total:
        open_layers = [i for i in range(3) if counts[i] > 2]
        counts[min(open_layers, key=lambda i: table[i, counts[i] - 1])] -= 1
    assert greedy_counts(costs, limits) == tuple(counts)


@pytest.mark.parametrize("seed", MANY)
def test_saliencies_dropped_give_the_global_rank(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, 6, generator=generator, dtype=torch.float64)
    limits = Limits((range(7),) * 3, seed % 19)
    costs = [dropped_saliency(layer, range(7)) for layer in scores]
    ranked = scores.flatten().argsort(descending=True)[: limits.total] // 6
    assert cheapest_counts(costs, limits) == tuple(ranked.bincount(minlength=3).tolist())


def test_blocks_drop_equally_many_each() -> None:
    scores = torch.tensor([1.0, 5, 2, 10, 30, 20], dtype=torch.float64)
    assert dropped_saliency(scores, [6, 4, 2], num_blocks=2).tolist() == [0, 11, 33]
    assert dropped_saliency(scores, [6, 4, 2]).tolist() == [0, 3, 18]


def test_a_falling_curve_goes_through_what_falls() -> None:
    curve = falling_curve([1, 4, 6, 9], [5.0, 2.0, 1.0, 0.0], range(1, 10))
    assert curve[[0, 3, 5, 8]].tolist() == pytest.approx([5, 2, 1, 0])
    assert bool((curve.diff() < 0).all())


@pytest.mark.parametrize("seed", MANY)
def test_a_falling_curve_never_rises_and_pools_what_does(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(5, generator=generator, dtype=torch.float64)
    curve = falling_curve([2, 4, 5, 7, 12], costs.tolist(), range(2, 13))
    assert bool((curve.diff() <= 1e-12).all())
    assert float(curve[[0, 2, 3, 5, 10]].mean()) == pytest.approx(float(costs.mean()))


def test_one_measurement_is_a_flat_curve() -> None:
    assert falling_curve([3], [0.5], [3]).tolist() == [0.5]


def test_a_grid_is_spread_from_end_to_end() -> None:
    assert spread_grid(range(4, 61), 5) == [4, 18, 32, 46, 60]
    assert spread_grid(range(4, 9, 2), 5) == [4, 6, 8]
    assert spread_grid(range(8, 9), 2) == [8]


@pytest.mark.parametrize("seed", MANY)
def test_moves_are_all_allocations_one_move_away(seed: int) -> None:
    limits = Limits((range(2, 9, 2), range(2, 9, 2), range(1, 8)), 12)
    counts = random.Random(seed).choice(every_allocation(limits))
    for num_experts in (1, 3):
        wanted = {}
        for other in every_allocation(limits):
            changed = [b - a for a, b in zip(counts, other, strict=True)]
            size = 2 if num_experts == 1 else 4
            wanted[other] = sorted(changed) == [-size, 0, size]
        found = moves(counts, limits, num_experts)
        assert sorted(found) == sorted(other for other, near in wanted.items() if near)
