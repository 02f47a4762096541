"""Distances of outputs and routing against loops and against a search for the best mixture."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from lightning_smoe.functional.distance import RouterLogit, TokenCosine
from lightning_smoe.functional.evidence import Evidence, TokenSample
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.routed_distance import GatedCosine, RoutedMerge
from tests.functional.layers import evidence_of, random_weights, sums_of, swiglu
from tests.functional.test_distance import LAYERS, assert_matches, outputs_of


def routed_by(weights: ExpertWeights, gates: list[list[float]]) -> Evidence:
    """Evidence of experts whose routing weights are given for every token."""
    given = torch.tensor(gates, dtype=torch.float64)
    num_tokens, num_experts = given.shape
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(num_tokens, 8, generator=generator, dtype=torch.float64)
    every = torch.arange(num_experts).expand(num_tokens, -1)
    sample = TokenSample(states, given, given, every)
    return Evidence(sums_of(weights, sample), sample, weights, swiglu)


@pytest.mark.parametrize("weights", LAYERS, ids=["gated", "plain", "biased", "float32"])
def test_gated_cosine_adds_the_cosines_of_logits_and_of_each_tokens_weighted_outputs(
    weights: ExpertWeights,
) -> None:
    evidence = evidence_of(weights, num_tokens=12)
    logits, outputs = evidence.sample.router_logits.double(), outputs_of(evidence)
    probs = logits.softmax(1)

    def one_pair(i: int, j: int) -> float:
        if i == j:  # A zero output is not even like itself, but its expert is.
            return 0
        by_logit = cosine_similarity(logits[:, i], logits[:, j], dim=0)
        by_output = sum(
            cosine_similarity(probs[t, i] * outputs[i, t], probs[t, j] * outputs[j, t], 0, 1e-30)
            for t in range(len(logits))
        ) / len(logits)
        return 1 - float(by_logit + by_output) / 2

    assert_matches(GatedCosine()(evidence), one_pair)


@pytest.mark.parametrize("weights", LAYERS, ids=["gated", "plain", "biased", "float32"])
def test_gated_cosine_of_outputs_compares_mean_weighted_outputs(weights: ExpertWeights) -> None:
    evidence = evidence_of(weights)
    logits = evidence.sample.router_logits.double()
    mean = (logits.softmax(1).T.unsqueeze(2) * outputs_of(evidence)).mean(1)

    def one_pair(i: int, j: int) -> float:
        by_logit = cosine_similarity(logits[:, i], logits[:, j], dim=0)
        return 1 - float(by_logit + cosine_similarity(mean[i], mean[j], 0, 1e-30)) / 2

    assert_matches(GatedCosine("outputs")(evidence), one_pair)


def test_gates_cancel_in_the_cosine_of_each_token() -> None:
    evidence = evidence_of(random_weights())
    half = (TokenCosine()(evidence) + RouterLogit()(evidence)) / 2
    torch.testing.assert_close(GatedCosine()(evidence), half)


@pytest.mark.parametrize("weights", LAYERS, ids=["gated", "plain", "biased", "float32"])
def test_routed_merge_is_the_least_error_of_any_constant_mixture(weights: ExpertWeights) -> None:
    evidence = evidence_of(weights, num_tokens=8, top_k=3)
    outputs, gates = outputs_of(evidence), evidence.gates.double()
    mixtures = torch.linspace(0, 1, 10001, dtype=torch.float64)

    def one_pair(i: int, j: int) -> float:
        if i == j:
            return 0
        error = torch.zeros_like(mixtures)
        for t in range(len(gates)):
            wanted = gates[t, i] * outputs[i, t] + gates[t, j] * outputs[j, t]
            share = mixtures.unsqueeze(1)
            mixed = share * outputs[i, t] + (1 - share) * outputs[j, t]
            error += (wanted - (gates[t, i] + gates[t, j]) * mixed).square().sum(1)
        return float(error.min()) / len(gates)

    assert_matches(RoutedMerge()(evidence), one_pair)


def test_routed_merge_of_experts_that_are_always_weighted_alike_costs_nothing() -> None:
    gates = [[0.2, 0.4, 0.1], [0.3, 0.6, 0.0], [0.05, 0.1, 0.7]]
    cost = RoutedMerge()(routed_by(random_weights(num_experts=3), gates))
    assert cost[0, 1] < 1e-6 * cost[0, 2]


def test_routed_merge_of_experts_that_never_meet_is_the_product_over_the_sum() -> None:
    gates = [[0.5, 0.0], [0.0, 0.25], [0.75, 0.0]]
    evidence = routed_by(random_weights(num_experts=2), gates)
    squared = (outputs_of(evidence)[0] - outputs_of(evidence)[1]).square().sum(1)
    first = (0.5**2 * squared[0] + 0.75**2 * squared[2]) / 3
    second = 0.25**2 * squared[1] / 3
    cost = RoutedMerge()(evidence)[0, 1]
    torch.testing.assert_close(cost, first * second / (first + second), rtol=1e-5, atol=0)


def test_routed_merge_with_an_unused_expert_costs_nothing() -> None:
    cost = RoutedMerge()(evidence_of(random_weights(), unvisited=2))
    assert cost[2].tolist() == [0] * 6


def test_routed_merge_of_two_unused_experts_costs_nothing() -> None:
    gates = [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    cost = RoutedMerge()(routed_by(random_weights(num_experts=3), gates))
    assert not cost.any()
