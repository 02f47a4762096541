"""Distances against loops over single tokens, and the laws that every distance obeys."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_smoe.functional.distance import (
    Distance,
    MeanOutput,
    Output,
    RouterLogit,
    TokenCosine,
)
from lightning_smoe.functional.evidence import Evidence, TokenSample
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.kernel_distance import LinearCka
from lightning_smoe.functional.routed_distance import GatedCosine, RoutedMerge
from lightning_smoe.functional.weight_distance import Weight
from tests.functional.layers import evidence_of, random_weights, sums_of, swiglu

OF_FUNCTIONS: list[Distance] = [
    MeanOutput(),
    MeanOutput("cosine"),
    Output(),
    TokenCosine(),
    RoutedMerge(),
    LinearCka(),
    LinearCka(debiased=True),
    Weight(),
    Weight(align=True),
]
ALL = [*OF_FUNCTIONS, RouterLogit(), GatedCosine(), GatedCosine("outputs")]
LAYERS = [
    random_weights(),
    random_weights(gated=False),
    random_weights(biased=True),
    random_weights(biased=True, dtype=torch.float32),
]


def outputs_of(evidence: Evidence) -> Tensor:
    """What every expert puts out on every token."""
    states = evidence.sample.states
    experts = range(evidence.num_experts)
    return torch.stack([evidence.weights.outputs(states, e, swiglu).double() for e in experts])


def assert_matches(result: Tensor, one_pair: Callable[[int, int], float]) -> None:
    experts = range(len(result))
    loop = [[one_pair(i, j) for j in experts] for i in experts]
    expected = torch.tensor(loop, dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", LAYERS, ids=["gated", "plain", "biased", "float32"])
def test_mean_output_is_the_distance_of_mean_outputs(weights: ExpertWeights) -> None:
    evidence = evidence_of(weights)
    mean = outputs_of(evidence).mean(1)
    assert_matches(MeanOutput()(evidence), lambda i, j: float((mean[i] - mean[j]).norm()))
    assert_matches(
        MeanOutput("cosine")(evidence),
        lambda i, j: 1 - float(cosine_similarity(mean[i], mean[j], dim=0)),
    )


@pytest.mark.parametrize("weights", LAYERS, ids=["gated", "plain", "biased", "float32"])
def test_output_is_the_root_mean_squared_distance_over_tokens(weights: ExpertWeights) -> None:
    evidence = evidence_of(weights)
    outputs = outputs_of(evidence)

    def one_pair(i: int, j: int) -> float:
        squared = [float((a - b).norm()) ** 2 for a, b in zip(outputs[i], outputs[j], strict=True)]
        return math.sqrt(sum(squared) / len(squared))

    assert_matches(Output()(evidence), one_pair)


def test_token_cosine_averages_the_cosine_of_each_token() -> None:
    evidence = evidence_of(random_weights())
    outputs = outputs_of(evidence)

    def one_pair(i: int, j: int) -> float:
        return 1 - float(cosine_similarity(outputs[i], outputs[j], dim=1).mean())

    assert_matches(TokenCosine()(evidence), one_pair)


def test_router_logit_compares_columns_of_logits() -> None:
    evidence = evidence_of(random_weights())
    logits = evidence.sample.router_logits
    assert_matches(
        RouterLogit()(evidence),
        lambda i, j: 1 - float(cosine_similarity(logits[:, i], logits[:, j], dim=0)),
    )


@pytest.mark.parametrize("distance", ALL, ids=str)
def test_distances_are_symmetric_with_a_zero_diagonal(distance: Distance) -> None:
    result = distance(evidence_of(random_weights(biased=True)))
    assert result.dtype == torch.float64
    assert torch.equal(result, result.mT)
    assert torch.equal(result.diagonal(), torch.zeros(6, dtype=torch.float64))
    assert (result >= 0).all()
    assert (result + torch.eye(6) > 0).all()


@pytest.mark.parametrize("distance", ALL, ids=str)
def test_the_order_of_experts_does_not_matter(distance: Distance) -> None:
    evidence = evidence_of(random_weights(biased=True))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = distance(evidence.select(order))
    torch.testing.assert_close(moved, distance(evidence)[order][:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", OF_FUNCTIONS, ids=str)
def test_equal_experts_are_nearer_than_rounding(distance: Distance) -> None:
    weights = random_weights().select(torch.tensor([0, 0, 1, 2, 3, 4]))
    result = distance(evidence_of(weights))
    assert result[0, 1] < 3e-4 * result.mean()


@pytest.mark.parametrize("distance", ALL, ids=str)
def test_an_expert_that_no_token_visits_has_distances(distance: Distance) -> None:
    assert distance(evidence_of(random_weights(), unvisited=2)).isfinite().all()


@pytest.mark.parametrize("distance", ALL, ids=str)
def test_an_expert_that_puts_out_nothing_has_distances(distance: Distance) -> None:
    weights = random_weights()
    assert weights.gate_proj is not None
    for tensor in (weights.up_proj, weights.gate_proj, weights.down_proj):
        tensor[1] = 0
    assert distance(evidence_of(weights)).isfinite().all()


@pytest.mark.parametrize("distance", ALL, ids=str)
def test_a_single_expert_is_at_distance_zero_from_itself(distance: Distance) -> None:
    result = distance(evidence_of(random_weights(num_experts=1), top_k=1))
    assert result.tolist() == [[0]]


@pytest.mark.parametrize("distance", ALL, ids=str)
def test_the_order_of_tokens_does_not_matter(distance: Distance) -> None:
    evidence = evidence_of(random_weights())
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    sample = evidence.sample
    fields = (sample.states, sample.router_logits, sample.routing_weights, sample.expert_indices)
    moved = TokenSample(*(field[order] for field in fields))
    shuffled = Evidence(sums_of(evidence.weights, moved), moved, evidence.weights, swiglu)
    torch.testing.assert_close(distance(shuffled), distance(evidence), rtol=1e-4, atol=1e-5)


def test_an_expert_with_zero_mean_output_has_cosine_distance_one() -> None:
    weights = random_weights()
    weights.down_proj[0] = 0
    assert MeanOutput("cosine")(evidence_of(weights))[0].tolist() == [0, 1, 1, 1, 1, 1]


def test_mean_output_takes_no_products_of_pairs() -> None:
    evidence = evidence_of(random_weights())
    MeanOutput()(evidence)
    assert "pairs" not in vars(evidence)
