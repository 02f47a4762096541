"""Costs of slots against what pooling them really loses, and the matching on them."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.evidence import Evidence, TokenSample
from lightning_smoe.functional.merging import GroupTokens
from lightning_smoe.functional.pooled_matching import PooledMatching, slot_costs
from lightning_smoe.functional.pooling import NeuronPool, slot_sums
from tests.functional.layers import evidence_of, random_weights, sums_of, swiglu

KINDS: list[dict[str, Any]] = [{"gated": True}, {"gated": False}, {"gated": True, "biased": True}]


def lost(evidence: Evidence, members: list[int]) -> float:
    """Energy of the members' neurons less what the slot keeps, neuron by neuron."""
    chosen = torch.tensor(members)
    weights = evidence.weights.select(chosen)
    gates = evidence.gates[:, chosen]
    sums = slot_sums(weights, GroupTokens(evidence.sample.states, gates, swiglu))
    column = weights.down_proj.double().square().sum(1)
    gain = (column * sums.cross.square() / sums.shared).flatten()
    kept = gain.sort(descending=True).values[: weights.up_proj.shape[1]]
    return float((column * sums.own).sum() - kept.sum())


def costs(evidence: Evidence, slots: list[list[int]]) -> Tensor:
    experts = list(range(evidence.num_experts))
    return slot_costs(evidence, experts, evidence.gates, slots)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [[[e] for e in range(6)], [[0, 4], [1], [2, 3, 5]]])
def test_the_cost_of_joining_is_what_pooling_loses_more(
    kind: dict[str, Any], slots: list[list[int]]
) -> None:
    evidence = evidence_of(random_weights(**kind))
    cost = costs(evidence, slots)
    for i, j in combinations(range(len(slots)), 2):
        alone = lost(evidence, slots[i]) + lost(evidence, slots[j])
        wanted = lost(evidence, slots[i] + slots[j]) - alone
        assert float(cost[i, j]) == pytest.approx(wanted, rel=1e-4)
        assert cost[i, j] == cost[j, i]


def test_the_pairs_are_the_cheapest() -> None:
    evidence = evidence_of(random_weights())
    cost = costs(evidence, [[e] for e in range(6)])
    labels = PooledMatching()(evidence, 4)

    def total(pairs: list[tuple[int, int]]) -> float:
        return sum(float(cost[pair]) for pair in pairs)

    edges = list(combinations(range(6), 2))
    best = min(total([a, b]) for a, b in combinations(edges, 2) if not {*a} & {*b})
    found = [(i, j) for i, j in edges if labels[i] == labels[j]]
    assert len(found) == 2
    assert total(found) == pytest.approx(best)


@pytest.mark.parametrize("num_groups", range(1, 7))
def test_there_are_as_many_groups_as_asked_for(num_groups: int) -> None:
    labels = PooledMatching()(evidence_of(random_weights()), num_groups).tolist()
    assert list(dict.fromkeys(labels)) == list(range(num_groups))


def test_the_order_of_the_experts_does_not_matter() -> None:
    evidence = evidence_of(random_weights())
    order = torch.randperm(6, generator=torch.Generator().manual_seed(4))
    sample = evidence.sample
    moved = TokenSample(
        sample.states,
        sample.router_logits[:, order],
        sample.routing_weights,
        order.argsort()[sample.expert_indices],
    )
    weights = evidence.weights.select(order)
    again = Evidence(sums_of(weights, moved), moved, weights, swiglu)
    for num_groups in (2, 3, 4):
        labels, others = PooledMatching()(evidence, num_groups), PooledMatching()(again, num_groups)
        together = {(i, j) for i, j in combinations(range(6), 2) if labels[i] == labels[j]}
        same = {(i, j) for i, j in combinations(range(6), 2) if others[i] == others[j]}
        assert {tuple(sorted((int(order[i]), int(order[j])))) for i, j in same} == together


def test_equal_experts_share_a_slot_first() -> None:
    weights = random_weights()
    shuffle = torch.tensor([3, 0, 4, 1, 2])
    assert weights.gate_proj is not None
    weights.gate_proj[4] = weights.gate_proj[1, shuffle]
    weights.up_proj[4] = weights.up_proj[1, shuffle]
    weights.down_proj[4] = weights.down_proj[1][:, shuffle]
    labels = PooledMatching()(evidence_of(weights), 5)
    assert labels[1] == labels[4]
    assert len(labels.unique()) == 5


def test_more_groups_than_different_experts_keep_copies_apart() -> None:
    weights = random_weights().map(lambda t: t[:1].expand(6, *t.shape[1:]).clone())
    labels = PooledMatching()(evidence_of(weights), 4).tolist()
    assert sorted(set(labels)) == [0, 1, 2, 3]


def test_an_expert_that_no_token_visits_costs_nothing() -> None:
    evidence = evidence_of(random_weights(), unvisited=2)
    labels = PooledMatching()(evidence, 5)
    assert int((labels == labels[2]).sum()) == 2


def test_an_impossible_number_of_groups_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_groups=7 is impossible with 6 experts"):
        PooledMatching()(evidence_of(random_weights()), 7)


def test_the_slot_of_a_matched_pair_is_pooled_as_priced() -> None:
    evidence = evidence_of(random_weights())
    members = torch.tensor([0, 3])
    tokens = GroupTokens(evidence.sample.states, evidence.gates[:, members], swiglu)
    slot = NeuronPool()(evidence.weights.select(members), torch.ones(2), tokens)
    assert slot.up_proj.shape == (1, 5, 8)
