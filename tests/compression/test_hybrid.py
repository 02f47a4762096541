"""Which experts are dropped and which merged, against trying all ways."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from lightning_smoe.compression.hybrid import Hybrid, likely_pairs
from lightning_smoe.compression.recipe import Execution
from lightning_smoe.functional.absorption import Absorber
from lightning_smoe.functional.merging import Average
from lightning_smoe.functional.pooled_matching import slot_costs
from lightning_smoe.functional.pooling import NeuronPool
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import LogSumExp, MeanRows
from lightning_smoe.functional.router_rows import Map
from tests.functional.layers import evidence_of, random_weights

NONE = torch.zeros(6, dtype=torch.bool)


def alone(*experts: int) -> Tensor:
    """Marks experts that stay as they are."""
    return torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(experts), True)


def changes_of(assignment: Tensor) -> set[tuple[int, ...]]:
    """Dropped experts and merged pairs."""
    found: dict[int, list[int]] = {}
    for expert, slot in enumerate(assignment.tolist()):
        found.setdefault(slot, []).append(expert)
    dropped = {(expert,) for expert in found.pop(-1, [])}
    return dropped | {tuple(slot) for slot in found.values() if len(slot) > 1}


def price(absorber: Absorber, change: tuple[int, ...]) -> float:
    if len(change) == 1:
        return absorber.price(absorber.drop(change[0]))
    return absorber.price(absorber.merge(change, NeuronPool()))


@pytest.mark.parametrize(("num_groups", "seed"), [(3, 0), (4, 1), (5, 2)])
def test_the_changes_are_the_cheapest_of_all(num_groups: int, seed: int) -> None:
    evidence = evidence_of(random_weights(seed=seed), seed=seed + 1)
    changes = [*((e,) for e in range(6)), *combinations(range(6), 2)]
    absorber = Absorber.of(evidence, 1024, 0.1)
    prices = {change: price(absorber, change) for change in changes}
    best = min(
        sum(prices[change] for change in chosen)
        for chosen in combinations(changes, 6 - num_groups)
        if len({e for change in chosen for e in change}) == sum(map(len, chosen))
    )
    assignment, shares = Hybrid(num_partners=5)(evidence, num_groups, NONE)
    found = changes_of(assignment)
    assert sum(prices[change] for change in found) == pytest.approx(best)
    assert shares.tolist() == [1] * 6


@pytest.mark.parametrize("num_partners", [0, 2])
@pytest.mark.parametrize("num_groups", range(1, 7))
def test_there_are_as_many_slots_as_asked_for(num_groups: int, num_partners: int) -> None:
    recipe = Hybrid(num_partners=num_partners)
    assignment, _ = recipe(evidence_of(random_weights()), num_groups, NONE)
    assert sorted(set(assignment.tolist()) - {-1}) == list(range(num_groups))
    if num_partners == 0:
        assert all(len(change) == 1 for change in changes_of(assignment))


def test_keeping_all_experts_changes_nothing() -> None:
    assert Hybrid()(evidence_of(random_weights()), 6, NONE)[0].tolist() == list(range(6))


def test_a_copy_is_merged_and_an_idle_expert_dropped() -> None:
    copied = random_weights().select(torch.tensor([0, 1, 2, 3, 1, 5]))
    evidence = evidence_of(copied, unvisited=2)
    assert Hybrid()(evidence, 4, NONE)[0].tolist() == [0, 1, -1, 2, 1, 3]


@pytest.mark.parametrize("single", [[1], [1, 4], [0, 1, 4]], ids=str)
def test_experts_that_stay_alone_are_neither_dropped_nor_merged(single: list[int]) -> None:
    copied = random_weights().select(torch.tensor([0, 1, 2, 3, 1, 5]))
    assignment, _ = Hybrid()(evidence_of(copied, unvisited=0), 3, alone(*single))
    found = assignment.tolist()
    for expert in single:
        assert found[expert] >= 0
        assert found.count(found[expert]) == 1


def test_where_more_experts_are_to_stay_alone_than_there_are_slots_for_none_is() -> None:
    evidence = evidence_of(random_weights())
    everyone = alone(0, 1, 2, 3)
    assert torch.equal(Hybrid()(evidence, 3, everyone)[0], Hybrid()(evidence, 3, NONE)[0])


def test_the_order_of_the_experts_does_not_matter() -> None:
    evidence = evidence_of(random_weights(), num_tokens=60)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(4))
    found = changes_of(Hybrid()(evidence, 3, NONE)[0])
    moved = changes_of(Hybrid()(evidence.select(order), 3, NONE)[0])
    assert {tuple(sorted(order[list(change)].tolist())) for change in moved} == found


def test_likely_pairs_are_those_that_pooling_loses_least_with() -> None:
    evidence = evidence_of(random_weights())
    cost = slot_costs(evidence, list(range(6)), evidence.gates, [[e] for e in range(6)])
    experts = [0, 2, 3, 5]
    wanted = set()
    for one in experts:
        nearest = min((e for e in experts if e != one), key=lambda other: float(cost[one, other]))
        wanted.add((min(one, nearest), max(one, nearest)))
    assert likely_pairs(evidence, experts, 1) == sorted(wanted)
    assert likely_pairs(evidence, experts, 9) == list(combinations(experts, 2))
    assert likely_pairs(evidence, [4], 9) == []


def test_it_is_carried_out_as_set() -> None:
    assert Hybrid().execution == Execution(LogSumExp(), NeuronPool(), None, Refit())
    recipe = Hybrid(merger=Average(), router=MeanRows(), refit=Refit(0.3), protect=False)
    assert recipe.execution == Execution(MeanRows(), Average(), None, Refit(0.3))
    assert Hybrid().protects_super_experts
    assert not recipe.protects_super_experts


def test_a_router_that_keeps_all_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="under the router Map every row needs a slot"):
        Hybrid(router=Map())


def test_settings_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="num_partners=-1 is below 0"):
        Hybrid(num_partners=-1)
    with pytest.raises(ValueError, match="num_tokens=1 leaves nothing to fit"):
        Hybrid(num_tokens=1)
    with pytest.raises(ValueError, match=r"strength=0\.0 must be at least"):
        Hybrid(strength=0.0)
