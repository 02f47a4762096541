"""Distances against loops over single tokens."""

import math
from collections.abc import Callable
from dataclasses import replace

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
from lightning_smoe.functional.sums import ExpertSums

NUM_TOKENS, NUM_EXPERTS, HIDDEN_SIZE = 6, 5, 3
GENERATOR = torch.Generator().manual_seed(0)
# Tokens, experts, hidden.
OUTPUTS = torch.randn(6, 5, 3, generator=GENERATOR, dtype=torch.float64)
LOGITS = torch.randn(6, 5, generator=GENERATOR, dtype=torch.float64)
ALL = [MeanOutput(), MeanOutput("cosine"), Output(), TokenCosine(), RouterLogit()]


def sums(outputs: Tensor = OUTPUTS) -> ExpertSums:
    unit = outputs / outputs.norm(dim=-1, keepdim=True)
    zeros = torch.zeros(NUM_EXPERTS, dtype=torch.float64)
    return ExpertSums(
        num_tokens=torch.tensor(NUM_TOKENS),
        count=torch.zeros(NUM_EXPERTS, dtype=torch.int64),
        gate_sum=zeros,
        output_norm_sum=zeros,
        gated_norm_sum=zeros,
        logit_gram=LOGITS.mT @ LOGITS,
        output_sum=outputs.sum(0),
        output_gram=(outputs @ outputs.mT).sum(0),
        output_cosine=(unit @ unit.mT).sum(0),
    )


def assert_matches(distance: Distance, one_pair: Callable[[int, int], float]) -> None:
    loop = [[one_pair(i, j) for j in range(NUM_EXPERTS)] for i in range(NUM_EXPERTS)]
    expected = torch.tensor(loop, dtype=torch.float64)
    torch.testing.assert_close(distance(sums()), expected, rtol=1e-9, atol=1e-9)


def test_mean_output_is_the_distance_of_mean_outputs() -> None:
    mean = OUTPUTS.mean(0)
    assert_matches(MeanOutput(), lambda i, j: float((mean[i] - mean[j]).norm()))


def test_mean_output_by_cosine_ignores_length() -> None:
    mean = OUTPUTS.mean(0)
    assert_matches(
        MeanOutput("cosine"), lambda i, j: 1 - float(cosine_similarity(mean[i], mean[j], dim=0))
    )


def test_output_is_the_root_mean_squared_distance_over_tokens() -> None:
    def one_pair(i: int, j: int) -> float:
        squared = [float((token[i] - token[j]).norm()) ** 2 for token in OUTPUTS]
        return math.sqrt(sum(squared) / NUM_TOKENS)

    assert_matches(Output(), one_pair)


def test_token_cosine_averages_the_cosine_of_each_token() -> None:
    def one_pair(i: int, j: int) -> float:
        cosines = [float(cosine_similarity(token[i], token[j], dim=0)) for token in OUTPUTS]
        return 1 - sum(cosines) / NUM_TOKENS

    assert_matches(TokenCosine(), one_pair)


def test_router_logit_compares_columns_of_logits() -> None:
    assert_matches(
        RouterLogit(), lambda i, j: 1 - float(cosine_similarity(LOGITS[:, i], LOGITS[:, j], dim=0))
    )


@pytest.mark.parametrize("distance", ALL, ids=str)
def test_distances_are_symmetric_with_a_zero_diagonal(distance: Distance) -> None:
    result = distance(sums())
    assert torch.equal(result, result.mT)
    assert torch.equal(result.diagonal(), torch.zeros(NUM_EXPERTS, dtype=torch.float64))
    assert (result >= 0).all()


@pytest.mark.parametrize("distance", ALL[:-1], ids=str)
def test_equal_experts_are_at_distance_zero(distance: Distance) -> None:
    outputs = OUTPUTS.clone()
    outputs[:, 1] = outputs[:, 0]
    assert distance(sums(outputs))[0, 1] < 1e-7


def test_an_expert_with_zero_mean_output_has_cosine_distance_one() -> None:
    outputs = OUTPUTS.clone()
    outputs[:, 0] = 0
    result = MeanOutput("cosine")(replace(sums(), output_sum=outputs.sum(0)))
    assert result[0].tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("distance", ALL, ids=str)
def test_needs_all_experts_says_whether_routed_tokens_are_enough(distance: Distance) -> None:
    routed_only = replace(sums(), output_sum=None, output_gram=None, output_cosine=None)
    if distance.needs_all_experts:
        with pytest.raises(ValueError, match="calibrate with every expert run on every token"):
            distance(routed_only)
    else:
        torch.testing.assert_close(distance(routed_only), distance(sums()))
