"""Neuron pooling against loops over tokens and neurons."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.merging import GroupTokens
from lightning_smoe.functional.pooling import NeuronPool
from tests.functional.layers import evidence_of, random_weights, swiglu

KINDS: list[dict[str, Any]] = [{"gated": True}, {"gated": False}, {"gated": True, "biased": True}]


def group_of(evidence: Evidence, members: list[int]) -> tuple[ExpertWeights, GroupTokens]:
    chosen = torch.tensor(members)
    tokens = GroupTokens(evidence.sample.states, evidence.gates[:, chosen], swiglu)
    return evidence.weights.select(chosen), tokens


def pooled(
    evidence: Evidence, members: list[int], merger: NeuronPool | None = None
) -> ExpertWeights:
    weights, tokens = group_of(evidence, members)
    return (merger or NeuronPool())(weights, torch.ones(len(members)), tokens)


def outputs(weights: ExpertWeights, states: Tensor, expert: int = 0) -> Tensor:
    return weights.outputs(states, expert, swiglu)


def by_loop(evidence: Evidence, members: list[int]) -> list[tuple[float, Tensor, Tensor]]:
    """Gain, up row and scaled output column of every neuron, best first."""
    weights, gates = evidence.weights, evidence.gates.double()
    found = []
    for member, neuron in product(members, range(weights.up_proj.shape[1])):
        hidden = evidence.activations(member)[:, neuron].double()
        cross = shared = 0.0
        for token in range(len(gates)):
            slot = sum(float(gates[token, other]) for other in members)
            fires = float(hidden[token]) ** 2
            cross += float(gates[token, member]) * slot * fires
            shared += slot * slot * fires
        column = weights.down_proj[member, :, neuron].double()
        gain = float(column.square().sum()) * cross**2 / shared
        found.append((gain, weights.up_proj[member, neuron], column * cross / shared))
    return sorted(found, key=lambda each: -each[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("members", [[0, 3], [1, 2, 5]])
def test_the_slot_holds_the_neurons_of_largest_gain_rescaled(
    kind: dict[str, Any], members: list[int]
) -> None:
    evidence = evidence_of(random_weights(**kind))
    slot = pooled(evidence, members)
    width = slot.up_proj.shape[1]
    wanted = {tuple(row.tolist()): column for _, row, column in by_loop(evidence, members)[:width]}
    assert len(wanted) == width
    for neuron in range(width):
        column = wanted[tuple(slot.up_proj[0, neuron].tolist())]
        torch.testing.assert_close(slot.down_proj[0, :, neuron], column, rtol=1e-5, atol=1e-7)


def test_the_output_bias_fits_the_summed_gates() -> None:
    evidence = evidence_of(random_weights(biased=True))
    slot = pooled(evidence, [0, 3])
    gates, biases = evidence.gates[:, [0, 3]].double(), evidence.weights.down_bias
    assert biases is not None
    assert slot.down_bias is not None
    summed = gates.sum(1, keepdim=True)
    wanted = torch.linalg.lstsq(summed, gates @ biases[[0, 3]]).solution
    torch.testing.assert_close(slot.down_bias, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copies", [2, 3])
def test_pooling_copies_of_one_expert_gives_that_expert(kind: dict[str, Any], copies: int) -> None:
    weights = random_weights(**kind)
    weights = weights.map(lambda t: torch.cat([t[:1]] * copies + [t[1:]]))
    evidence = evidence_of(weights)
    slot = pooled(evidence, list(range(copies)))
    states = evidence.sample.states
    torch.testing.assert_close(
        outputs(slot, states), outputs(weights, states), rtol=1e-5, atol=1e-6
    )


def test_pooling_a_copy_with_its_neurons_in_another_order_gives_that_expert() -> None:
    weights = random_weights(2)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(2))
    assert weights.gate_proj is not None
    weights.gate_proj[1] = weights.gate_proj[0, order]
    weights.up_proj[1] = weights.up_proj[0, order]
    weights.down_proj[1] = weights.down_proj[0][:, order]
    evidence = evidence_of(weights, top_k=1)
    slot, states = pooled(evidence, [0, 1]), evidence.sample.states
    torch.testing.assert_close(
        outputs(slot, states), outputs(weights, states), rtol=1e-5, atol=1e-6
    )


def test_experts_that_agree_but_in_output_columns_share_their_neurons() -> None:
    weights = random_weights(2)
    assert weights.gate_proj is not None
    weights.gate_proj[1], weights.up_proj[1] = weights.gate_proj[0], weights.up_proj[0]
    evidence = evidence_of(weights, top_k=2)
    slot, gates = pooled(evidence, [0, 1]), evidence.gates.double()
    hidden, summed = evidence.activations(0), gates.sum(1)
    for neuron in range(5):
        # The best column for the summed gates, by least squares over tokens.
        target = sum(
            (gates[:, e] * hidden[:, neuron])[:, None] * weights.down_proj[e, :, neuron]
            for e in range(2)
        )
        fires = (summed * hidden[:, neuron])[:, None]
        wanted = torch.linalg.lstsq(fires, torch.as_tensor(target)).solution[0]
        torch.testing.assert_close(slot.down_proj[0, :, neuron], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_members_does_not_matter(kind: dict[str, Any]) -> None:
    evidence = evidence_of(random_weights(**kind))
    states = evidence.sample.states
    one, other = pooled(evidence, [0, 3, 4]), pooled(evidence, [4, 0, 3])
    torch.testing.assert_close(outputs(one, states), outputs(other, states), rtol=1e-6, atol=1e-8)


def test_a_group_that_no_token_visits_keeps_its_heaviest_member() -> None:
    evidence = evidence_of(random_weights())
    weights, tokens = group_of(evidence, [0, 1])
    silent = GroupTokens(tokens.states, torch.zeros_like(tokens.gates), swiglu)
    slot = NeuronPool()(weights, torch.tensor([0.2, 0.8]), silent)
    assert torch.equal(slot.up_proj, weights.up_proj[1:])
    assert torch.equal(slot.down_proj, weights.down_proj[1:])


def test_a_member_that_no_token_visits_leaves_the_other_as_it_is() -> None:
    evidence = evidence_of(random_weights(), unvisited=2)
    slot, states = pooled(evidence, [2, 4]), evidence.sample.states
    wanted = outputs(evidence.weights, states, 4)
    torch.testing.assert_close(outputs(slot, states), wanted, rtol=1e-5, atol=1e-6)


def test_one_expert_stays_as_it_is() -> None:
    evidence = evidence_of(random_weights(biased=True))
    slot, states = pooled(evidence, [3]), evidence.sample.states
    wanted = outputs(evidence.weights, states, 3)
    torch.testing.assert_close(outputs(slot, states), wanted, rtol=1e-6, atol=1e-8)


def test_by_energy_the_neurons_that_did_most_stay() -> None:
    evidence = evidence_of(random_weights())
    slot = pooled(evidence, [0, 3], NeuronPool("energy", rescale=False))
    energy = {}
    for member, neuron in product([0, 3], range(5)):
        column = evidence.weights.down_proj[member, :, neuron]
        done = (evidence.gates[:, member] * evidence.activations(member)[:, neuron]).square().sum()
        energy[member, neuron] = float(done * column.square().sum())
    best = sorted(energy, key=lambda place: -energy[place])[:5]
    kept = {tuple(column.tolist()) for column in slot.down_proj[0].T}
    assert kept == {tuple(evidence.weights.down_proj[m, :, n].tolist()) for m, n in best}


def test_half_precision_weights_stay_half_precision() -> None:
    evidence = evidence_of(random_weights(biased=True, dtype=torch.bfloat16))
    slot = pooled(evidence, [0, 1])
    assert {t.dtype for t in vars(slot).values() if t is not None} == {torch.bfloat16}
    assert bool(slot.down_proj.isfinite().all())


def test_pooling_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="NeuronPool"):
        NeuronPool()(random_weights(2), torch.ones(2))
