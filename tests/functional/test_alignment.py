"""Alignment undoes permutations and changes no expert's function."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.alignment import (
    Alignment,
    ByActivations,
    ByBoth,
    ByWeights,
    align_neurons,
)
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.merging import GroupTokens
from tests.functional.groups import KINDS, group_of, reordered, tokens_of
from tests.functional.layers import swiglu
from tests.weights import parts

ORDER = [3, 0, 4, 1, 2]

every_alignment = pytest.mark.parametrize("alignment", [ByWeights(), ByActivations(), ByBoth()])


def shuffled_pair(kind: str, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    """Puts an expert beside a copy of itself whose neurons are in another order."""
    expert = group_of(kind, 1, dtype)
    return ExpertWeights.stack([expert, reordered(expert, ORDER)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", [0, 1])
@every_alignment
def test_a_shuffled_copy_aligns_back_exactly(
    alignment: Alignment, reference: int, kind: str, dtype: torch.dtype
) -> None:
    pair = shuffled_pair(kind, dtype)
    aligned = alignment(pair, reference, tokens_of(2, dtype))
    for part in parts(aligned):
        assert torch.equal(part[0], part[1])
        assert part.dtype == dtype
    assert torch.equal(aligned.up_proj[reference], pair.up_proj[reference])


@pytest.mark.parametrize("kind", KINDS)
@every_alignment
def test_no_member_computes_anything_else_than_before(alignment: Alignment, kind: str) -> None:
    experts, tokens = group_of(kind), tokens_of()
    aligned = alignment(experts, 1, tokens)
    assert not torch.equal(aligned.up_proj, experts.up_proj)
    for member in range(3):
        before = experts.outputs(tokens.states, member, swiglu)
        torch.testing.assert_close(aligned.outputs(tokens.states, member, swiglu), before)


@every_alignment
def test_a_member_is_matched_to_the_reference_whoever_else_is_there(alignment: Alignment) -> None:
    experts, tokens = group_of(), tokens_of()
    moved = torch.tensor([2, 1, 0])
    others = GroupTokens(tokens.states, tokens.gates[:, moved], swiglu)
    aligned = alignment(experts, 1, tokens).select(moved)
    for ours, theirs in zip(
        parts(alignment(experts.select(moved), 1, others)), parts(aligned), strict=True
    ):
        assert torch.equal(ours, theirs)


def best_order(similarity: Tensor) -> Tensor:
    """Tries all orders."""
    orders = [list(order) for order in permutations(range(len(similarity)))]
    sums = [sum(float(similarity[i, j]) for i, j in enumerate(order)) for order in orders]
    return torch.tensor(orders[sums.index(max(sums))])


def weight_similarity(experts: ExpertWeights) -> Tensor:
    """Inner products of the neurons of the first and of the second expert."""
    similarity = torch.zeros(5, 5)
    for first in range(5):
        for second in range(5):
            for rows in (experts.gate_proj, experts.up_proj, experts.down_proj.mT):
                if rows is not None:
                    similarity[first, second] += rows[0, first] @ rows[1, second]
            for bias in (experts.gate_bias, experts.up_bias):
                if bias is not None:
                    similarity[first, second] += bias[0, first] * bias[1, second]
    return similarity


def activation_similarity(experts: ExpertWeights, tokens: GroupTokens) -> Tensor:
    """Correlations of the neurons of the first and of the second expert on routed tokens."""
    routed = [t for t in range(60) if float(tokens.gates[t].sum()) > 0]
    first, second = (experts.activations(tokens.states[routed], e, swiglu) for e in (0, 1))
    similarity = torch.zeros(5, 5)
    for i in range(5):
        for j in range(5):
            pair = torch.stack([first[:, i], second[:, j]])
            similarity[i, j] = torch.corrcoef(pair)[0, 1]
    return similarity


@pytest.mark.parametrize("kind", KINDS)
def test_the_matching_is_the_best_of_all_orders(kind: str) -> None:
    experts, tokens = group_of(kind, 2), tokens_of(2)
    weights, activations = weight_similarity(experts), activation_similarity(experts, tokens)
    both = weights / weights.std() + activations / activations.std()
    for alignment, similarity in (
        (ByWeights(), weights),
        (ByActivations(), activations),
        (ByBoth(), both),
    ):
        aligned = alignment(experts, 0, tokens)
        assert torch.equal(aligned.up_proj[1], experts.up_proj[1, best_order(similarity)])


def test_aligning_neurons_without_saying_how_is_by_weights() -> None:
    experts = group_of()
    for ours, theirs in zip(
        parts(align_neurons(experts, 2)), parts(ByWeights()(experts, 2)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_group_that_no_token_visits_keeps_its_order_by_activations() -> None:
    experts, tokens = group_of(), tokens_of()
    tokens.gates.zero_()
    assert torch.equal(ByActivations()(experts, 0, tokens).up_proj, experts.up_proj)
    by_weights = ByWeights()(experts, 0).up_proj
    assert torch.equal(ByBoth()(experts, 0, tokens).up_proj, by_weights)


@every_alignment
def test_neurons_that_never_fire_do_no_harm(alignment: Alignment) -> None:
    pair = shuffled_pair("plain")
    pair.up_proj[0, 2] = 0
    pair.up_proj[1, ORDER.index(2)] = 0
    aligned = alignment(pair, 0, tokens_of(2))
    assert torch.equal(aligned.up_proj[0], aligned.up_proj[1])


@pytest.mark.parametrize("alignment", [ByActivations(), ByBoth()])
def test_tokens_are_asked_for_where_they_are_needed(alignment: Alignment) -> None:
    assert alignment.needs_tokens
    with pytest.raises(ValueError, match="is fitted on calibration tokens; give it"):
        alignment(group_of(), 0)
