"""Kernel alignment against its definition in features, and what it must not see."""

import math

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.kernel_distance import LinearCka
from tests.functional.layers import evidence_of, random_weights
from tests.functional.test_distance import LAYERS, assert_matches, outputs_of


def unbiased_product(first: Tensor, second: Tensor) -> float:
    """The estimator of Song et al. (2012), Eq. 5, of two matrices of inner products."""
    first, second = first.clone().fill_diagonal_(0), second.clone().fill_diagonal_(0)
    tokens = len(first)
    one = torch.ones(tokens, dtype=torch.float64)
    together = (first @ second).trace()
    apart = (one @ first @ one) * (one @ second @ one) / ((tokens - 1) * (tokens - 2))
    mixed = 2 / (tokens - 2) * (one @ first @ second @ one)
    return float(together + apart - mixed) / (tokens * (tokens - 3))


@pytest.mark.parametrize("weights", LAYERS, ids=["gated", "plain", "biased", "float32"])
def test_linear_cka_compares_covariances_of_outputs(weights: ExpertWeights) -> None:
    evidence = evidence_of(weights)
    centred = outputs_of(evidence)
    centred = centred - centred.mean(1, keepdim=True)

    def one_pair(i: int, j: int) -> float:
        own = (centred[i].T @ centred[i]).norm() * (centred[j].T @ centred[j]).norm()
        return 1 - float((centred[i].T @ centred[j]).norm() ** 2 / own)

    assert_matches(LinearCka()(evidence), one_pair)


def test_debiased_cka_is_the_ratio_of_unbiased_estimates() -> None:
    evidence = evidence_of(random_weights())
    kernels = [outputs @ outputs.T for outputs in outputs_of(evidence)]

    def one_pair(i: int, j: int) -> float:
        own = unbiased_product(kernels[i], kernels[i]) * unbiased_product(kernels[j], kernels[j])
        return 1 - unbiased_product(kernels[i], kernels[j]) / math.sqrt(own)

    assert_matches(LinearCka(debiased=True)(evidence), one_pair)


@pytest.mark.parametrize("debiased", [False, True])
def test_rotation_scale_and_shift_of_outputs_do_not_matter(*, debiased: bool) -> None:
    weights = random_weights(biased=True).select(torch.tensor([0, 0, 1]))
    assert weights.down_bias is not None
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    weights.down_proj[1] = 3 * torch.linalg.qr(square).Q @ weights.down_proj[0]
    weights.down_bias[1] += 5
    result = LinearCka(debiased=debiased)(evidence_of(weights))
    assert result[0, 1] < 1e-5
    assert result[0, 2] > 0.1


def test_tokens_are_taken_at_even_steps() -> None:
    evidence = evidence_of(random_weights(), num_tokens=41)
    few = LinearCka(num_tokens=5)(evidence)
    sample = evidence.sample
    chosen = type(sample)(
        sample.states[::10],
        sample.router_logits[::10],
        sample.routing_weights[::10],
        sample.expert_indices[::10],
    )
    alone = Evidence(evidence.sums, chosen, evidence.weights, evidence.activate)
    torch.testing.assert_close(few, LinearCka()(alone))
    assert not torch.allclose(few, LinearCka()(evidence))


def test_the_plain_value_overrates_unrelated_experts_where_tokens_are_few() -> None:
    evidence = evidence_of(random_weights(hidden=64, intermediate=64), num_tokens=16)
    plain, debiased = LinearCka()(evidence), LinearCka(debiased=True)(evidence)
    unrelated = ~torch.eye(6, dtype=torch.bool)
    assert plain[unrelated].mean() < 0.5
    assert debiased[unrelated].mean() > 0.8


def test_a_constant_output_is_at_distance_one_from_all_others() -> None:
    weights = random_weights(biased=True)
    weights.down_proj[2] = 0
    result = LinearCka()(evidence_of(weights))[2]
    torch.testing.assert_close(result, torch.tensor([1, 1, 0, 1, 1, 1.0]).double())


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="num_tokens=3 is too few to compare; take 4 or more"):
        LinearCka(num_tokens=3)
