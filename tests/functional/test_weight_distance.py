"""Distances of weights against loops over matrices and over all orders of neurons."""

import math
from dataclasses import fields
from itertools import permutations

import pytest
import torch

from lightning_smoe.functional import weight_distance
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.weight_distance import Weight
from tests.functional.layers import evidence_of, random_weights
from tests.functional.test_distance import LAYERS, assert_matches


def distance_of(weights: ExpertWeights, i: int, j: int) -> float:
    """Root of the sum of squared differences, number by number."""
    squared = 0.0
    for field in fields(weights):
        tensor = getattr(weights, field.name)
        if tensor is not None:
            squared += float((tensor[i].double() - tensor[j].double()).square().sum())
    return math.sqrt(squared)


def reordered(weights: ExpertWeights, expert: int, order: list[int]) -> ExpertWeights:
    """The weights with one expert's neurons in another order."""
    moved = weights.map(torch.clone)
    for name in ("gate_proj", "up_proj", "gate_bias", "up_bias"):
        tensor = getattr(moved, name)
        if tensor is not None:
            tensor[expert] = tensor[expert][order]
    moved.down_proj[expert] = moved.down_proj[expert][:, order]
    return moved


@pytest.mark.parametrize("weights", LAYERS, ids=["gated", "plain", "biased", "float32"])
@pytest.mark.parametrize("block", [7, 1 << 22])
def test_weight_is_the_frobenius_distance_over_all_matrices(
    weights: ExpertWeights, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_distance, "_BLOCK_NUMBERS", block)
    assert_matches(Weight()(evidence_of(weights)), lambda i, j: distance_of(weights, i, j))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_aligned_weight_is_the_least_distance_of_any_order_of_neurons(
    *, gated: bool, biased: bool
) -> None:
    weights = random_weights(num_experts=3, intermediate=4, gated=gated, biased=biased)
    orders = [list(order) for order in permutations(range(4))]

    def one_pair(i: int, j: int) -> float:
        if i == j:
            return 0
        return min(distance_of(reordered(weights, j, order), i, j) for order in orders)

    assert_matches(Weight(align=True)(evidence_of(weights)), one_pair)


def test_aligned_weight_of_one_expert_in_two_orders_is_exactly_zero() -> None:
    weights = random_weights(biased=True).select(torch.tensor([0, 0, 1]))
    shuffled = evidence_of(reordered(weights, 1, [3, 1, 4, 0, 2]))
    assert Weight(align=True)(shuffled)[0, 1] == 0
    assert Weight()(shuffled)[0, 1] > 1


def test_experts_with_a_common_ancestor_keep_their_distances_in_float32() -> None:
    ancestor = random_weights(num_experts=1).select(torch.zeros(4, dtype=torch.int64))
    change = random_weights(num_experts=4, seed=1)
    near = ExpertWeights(
        up_proj=ancestor.up_proj + 1e-4 * change.up_proj,
        down_proj=ancestor.down_proj + 1e-4 * change.down_proj,
    ).map(torch.Tensor.float)
    expected = distance_of(near, 0, 1)
    assert float(Weight()(evidence_of(near))[0, 1]) == pytest.approx(expected, rel=1e-5)
