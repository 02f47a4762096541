"""Greedy elimination against running the layer without each expert."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.leave_one_out import LeaveOneOut
from lightning_smoe.functional.routing import RoutingRule, Score
from tests.functional.layers import evidence_of, random_weights, sums_of

SCORES: tuple[Score, ...] = ("softmax", "sigmoid")
RULES = [RoutingRule(score, normal, 1.7) for score, normal in product(SCORES, (True, False))]


def routed_by(rule: RoutingRule, evidence: Evidence) -> Evidence:
    """The same layer under another rule."""
    sample = evidence.sample
    weights = rule.weights(sample.router_logits, sample.expert_indices)
    sample = replace(sample, routing_weights=weights)
    return replace(evidence, sample=sample, sums=sums_of(evidence.weights, sample))


def layer_output(evidence: Evidence, gates: Tensor) -> Tensor:
    """Weighted sum of all experts' outputs."""
    total = torch.zeros_like(evidence.sample.states)
    for expert in range(evidence.num_experts):
        outputs = evidence.weights.outputs(evidence.sample.states, expert, evidence.activate)
        total += gates[:, expert, None] * outputs
    return total


def turns_by_trying_all(rule: RoutingRule, evidence: Evidence) -> list[float]:
    """Runs the layer without each remaining expert and drops the one that is missed least."""
    number = evidence.num_experts
    target = layer_output(evidence, evidence.sample.gates.double())
    remaining = list(range(number))
    turns = [number - 1.0] * number
    for turn in range(number - 1):
        errors = {}
        for expert in remaining:
            kept = torch.zeros(number).bool()
            kept[[other for other in remaining if other != expert]] = True
            output = layer_output(evidence, rule.gates_without(evidence.sample, kept))
            errors[expert] = float((output - target).square().sum())
        gone = min(errors, key=lambda expert: errors[expert])
        turns[gone] = turn
        remaining.remove(gone)
    return turns


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("gated", "biased", "top_k"), [(True, False, 2), (False, True, 3)])
def test_experts_go_in_the_order_of_the_slow_loop(
    rule: RoutingRule, gated: bool, biased: bool, top_k: int
) -> None:
    weights = random_weights(num_experts=9, gated=gated, biased=biased)
    evidence = routed_by(rule, evidence_of(weights, top_k=top_k))
    assert LeaveOneOut()(evidence).tolist() == turns_by_trying_all(rule, evidence)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_importance_counts_turns(rule: RoutingRule) -> None:
    evidence = routed_by(rule, evidence_of(random_weights()))
    assert sorted(LeaveOneOut()(evidence).tolist()) == [0, 1, 2, 3, 4, 5]


def test_an_expert_that_no_token_visits_goes_first() -> None:
    evidence = evidence_of(random_weights(), unvisited=3)
    assert float(LeaveOneOut()(evidence)[3]) == 0


def test_one_of_two_equal_experts_goes_before_the_rest() -> None:
    weights = random_weights(num_experts=6)
    for matrices in (weights.gate_proj, weights.up_proj, weights.down_proj):
        assert matrices is not None
        matrices[4] = matrices[1]
    evidence = evidence_of(weights, num_tokens=200, normalize=True)
    # A router that cannot tell the two apart sends every token to both.
    logits = evidence.sample.router_logits.clone()
    logits[:, 4] = logits[:, 1] - 1e-3
    gates, indices = logits.softmax(1).topk(2)
    gates = gates / gates.sum(1, keepdim=True)
    sample = replace(
        evidence.sample, router_logits=logits, routing_weights=gates, expert_indices=indices
    )
    turns = LeaveOneOut()(replace(evidence, sample=sample))
    assert float(turns[[1, 4]].min()) < 3


def test_the_order_of_the_experts_does_not_matter() -> None:
    evidence = evidence_of(random_weights())
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    place = order.argsort()
    sample = evidence.sample
    moved = replace(
        sample,
        router_logits=sample.router_logits[:, order],
        expert_indices=place[sample.expert_indices],
    )
    permuted = replace(evidence, sample=moved, weights=evidence.weights.select(order))
    assert torch.equal(LeaveOneOut()(permuted), LeaveOneOut()(evidence)[order])


def test_tokens_are_spread_over_the_sample() -> None:
    evidence = evidence_of(random_weights(), num_tokens=40)
    sample = evidence.sample
    every_second = replace(
        sample,
        states=sample.states[::2],
        router_logits=sample.router_logits[::2],
        routing_weights=sample.routing_weights[::2],
        expert_indices=sample.expert_indices[::2],
    )
    thinned = LeaveOneOut(num_tokens=20)(evidence)
    assert torch.equal(thinned, LeaveOneOut()(replace(evidence, sample=every_second)))


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="num_tokens=0"):
        LeaveOneOut(0)


def test_a_selection_of_the_experts_has_their_turns_in_the_whole_layer() -> None:
    evidence = evidence_of(random_weights(), num_tokens=60)
    members = torch.tensor([0, 2, 3])
    whole = LeaveOneOut()(evidence)
    assert torch.equal(LeaveOneOut()(evidence.select(members)), whole[members])
