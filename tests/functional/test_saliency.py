"""Saliency against loops over single tokens."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.saliency import (
    Frequency,
    GateMass,
    MoNE,
    OutputNormMean,
    OutputNormSum,
    OutputVariance,
    Random,
    Reap,
    ReapEnergy,
    ReapSum,
    Saliency,
)
from tests.functional.layers import evidence_of, random_weights, swiglu

UNVISITED = 4
ALL = (
    Random(),
    Frequency(),
    GateMass(),
    OutputNormSum(),
    OutputNormMean(),
    Reap(),
    ReapSum(),
    ReapEnergy(),
    OutputVariance(),
    MoNE(),
)


@pytest.fixture(scope="module", params=[(True, False), (True, True), (False, True)], ids=str)
def evidence(request: pytest.FixtureRequest) -> Evidence:
    """Layers with and without gates and biases, in which one expert is never visited."""
    gated, biased = request.param
    return evidence_of(random_weights(gated=gated, biased=biased), unvisited=UNVISITED)


def visits(evidence: Evidence, expert: int) -> list[tuple[float, Tensor]]:
    """Routing weight and output of one expert for each token that visits it."""
    found = []
    sample = evidence.sample
    for token in range(sample.num_tokens):
        for place, chosen in enumerate(sample.expert_indices[token].tolist()):
            if chosen == expert:
                state = sample.states[token : token + 1]
                output = evidence.weights.outputs(state, expert, swiglu)[0]
                found.append((float(sample.routing_weights[token, place]), output))
    return found


def assert_follows(
    saliency: Saliency, evidence: Evidence, formula: Callable[[list[tuple[float, Tensor]]], float]
) -> None:
    seen = [visits(evidence, expert) for expert in range(evidence.num_experts)]
    expected = [formula(routed) if routed else 0.0 for routed in seen]
    assert not seen[UNVISITED]
    torch.testing.assert_close(saliency(evidence), torch.tensor(expected, dtype=torch.float64))


def test_frequency_is_the_fraction_of_tokens_that_visit(evidence: Evidence) -> None:
    assert_follows(Frequency(), evidence, lambda routed: len(routed) / 40)


def test_gate_mass_adds_up_routing_weights(evidence: Evidence) -> None:
    assert_follows(GateMass(), evidence, lambda routed: sum(g for g, _ in routed))


def test_output_norm_sum_adds_up_norms(evidence: Evidence) -> None:
    assert_follows(
        OutputNormSum(), evidence, lambda routed: sum(float(f.norm()) for _, f in routed)
    )


def test_output_norm_mean_averages_norms_over_visits(evidence: Evidence) -> None:
    def formula(routed: list[tuple[float, Tensor]]) -> float:
        return sum(float(f.norm()) for _, f in routed) / len(routed)

    assert_follows(OutputNormMean(), evidence, formula)


def test_reap_is_the_mean_weighted_norm_of_routed_tokens(evidence: Evidence) -> None:
    def formula(routed: list[tuple[float, Tensor]]) -> float:
        return sum(g * float(f.norm()) for g, f in routed) / len(routed)

    assert_follows(Reap(), evidence, formula)


def test_reap_sum_is_the_summed_weighted_norm_of_routed_tokens(evidence: Evidence) -> None:
    assert_follows(ReapSum(), evidence, lambda routed: sum(g * float(f.norm()) for g, f in routed))


def test_reap_energy_is_what_the_output_changes_by_when_the_expert_is_left_out(
    evidence: Evidence,
) -> None:
    def formula(routed: list[tuple[float, Tensor]]) -> float:
        return float(torch.stack([g * f for g, f in routed]).norm())

    assert_follows(ReapEnergy(), evidence, formula)


def test_output_variance_is_what_the_mean_output_in_the_experts_place_would_lose(
    evidence: Evidence,
) -> None:
    def formula(routed: list[tuple[float, Tensor]]) -> float:
        outputs = torch.stack([f for _, f in routed])
        return float((outputs - outputs.mean(0)).square().sum())

    assert_follows(OutputVariance(), evidence, formula)


def test_mone_is_mean_gate_times_deviation_of_the_output(evidence: Evidence) -> None:
    def formula(routed: list[tuple[float, Tensor]]) -> float:
        variance = torch.stack([f for _, f in routed]).var(0)
        return sum(g for g, _ in routed) / len(routed) * float(variance.sum().sqrt())

    assert_follows(MoNE(), evidence, formula)


@pytest.mark.parametrize("saliency", [OutputVariance(), MoNE()], ids=str)
def test_an_expert_whose_output_never_changes_has_no_variance(saliency: Saliency) -> None:
    weights = random_weights(biased=True)
    weights.down_proj[2] = 0
    assert float(saliency(evidence_of(weights))[2]) < 1e-6


@pytest.mark.parametrize("saliency", ALL, ids=str)
def test_importance_is_finite_and_at_least_zero(saliency: Saliency, evidence: Evidence) -> None:
    scores = saliency(evidence)
    assert scores.shape == (evidence.num_experts,)
    assert bool(scores.isfinite().all() & (scores >= 0).all())


@pytest.mark.parametrize("saliency", ALL[1:], ids=str)
def test_the_order_of_the_experts_does_not_matter(saliency: Saliency, evidence: Evidence) -> None:
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    torch.testing.assert_close(saliency(evidence.select(order)), saliency(evidence)[order])


def test_one_seed_gives_one_importance_and_another_seed_another(evidence: Evidence) -> None:
    assert torch.equal(Random(3)(evidence), Random(3)(evidence))
    assert not torch.equal(Random(3)(evidence), Random(4)(evidence))


def test_random_importance_differs_between_layers_but_not_between_texts() -> None:
    weights = random_weights(seed=0)
    here, other_text = evidence_of(weights, seed=1), evidence_of(weights, seed=2)
    other_layer = evidence_of(random_weights(seed=5), seed=1)
    assert torch.equal(Random()(here), Random()(other_text))
    assert not torch.equal(Random()(here), Random()(other_layer))


def test_random_importance_reads_weights_of_any_type() -> None:
    evidence = evidence_of(random_weights(dtype=torch.float32))
    halved = replace(evidence, weights=evidence.weights.map(lambda tensor: tensor.bfloat16()))
    assert bool(Random()(halved).isfinite().all())
