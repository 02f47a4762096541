"""Prices of changes of slots against refits that leave out one token after the other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.absorption import Absorber, SlotChange
from lightning_smoe.functional.evidence import Evidence, TokenSample
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.merging import GroupTokens
from lightning_smoe.functional.pooling import NeuronPool
from tests.functional.layers import evidence_of, random_weights, sums_of, swiglu

KINDS: list[dict[str, Any]] = [{"gated": True}, {"gated": False}, {"gated": True, "biased": True}]


def features_of(evidence: Evidence, weights: ExpertWeights, expert: int, gate: Tensor) -> Tensor:
    hidden = weights.activations(evidence.sample.states, expert, evidence.activate)
    return torch.stack([gate[t] * hidden[t] for t in range(len(gate))])


def slot_of(evidence: Evidence, pair: tuple[int, int]) -> ExpertWeights:
    chosen = torch.tensor(pair)
    tokens = GroupTokens(evidence.sample.states, evidence.gates[:, chosen], evidence.activate)
    return NeuronPool()(evidence.weights.select(chosen), torch.ones(2).double(), tokens)


def error_of_refits(evidence: Evidence, gone: tuple[int, ...], strength: float) -> float:
    """Fits without each token in turn, and looks at that token."""
    gates = evidence.gates.double()
    count = range(evidence.num_experts)
    whole = [features_of(evidence, evidence.weights, e, gates[:, e]) for e in count]
    wanted = torch.zeros_like(evidence.sample.states)
    for e in gone:
        outputs = evidence.weights.outputs(evidence.sample.states, e, swiglu)
        wanted = wanted + gates[:, e : e + 1] * outputs
    kept = [whole[e] for e in count if e not in gone]
    if len(gone) == 2:
        slot, gate = slot_of(evidence, gone), gates[:, list(gone)].sum(1)
        kept.append(features_of(evidence, slot, 0, gate))
        wanted = wanted - gate[:, None] * slot.outputs(evidence.sample.states, 0, swiglu)
    every = torch.cat(whole, dim=1)
    energy = every.square().sum() / every.ne(0).any(0).sum()
    features = torch.cat(kept, dim=1)
    unit = torch.eye(features.shape[1], dtype=torch.float64)
    error = 0.0
    for token in range(len(features)):
        others = torch.arange(len(features)) != token
        phi, goal = features[others], wanted[others]
        change = torch.linalg.solve(phi.T @ phi + strength * energy * unit, phi.T @ goal)
        error += float((wanted[token] - features[token] @ change).square().sum())
    return error


def without(evidence: Evidence, *gone: int) -> tuple[Absorber, SlotChange]:
    absorber = Absorber.of(evidence, 1000, 0.1)
    if len(gone) == 1:
        return absorber, absorber.drop(gone[0])
    return absorber, absorber.merge(gone, NeuronPool())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("gone", [(0,), (3,), (1, 4), (5, 2)], ids=str)
@pytest.mark.parametrize("strength", [0.01, 0.1, 1.0])
def test_the_price_is_the_error_of_fits_without_each_token(
    kind: dict[str, Any], gone: tuple[int, ...], strength: float
) -> None:
    evidence = evidence_of(random_weights(**kind))
    absorber = Absorber.of(evidence, 1000, strength)
    change = absorber.drop(gone[0]) if len(gone) == 1 else absorber.merge(gone, NeuronPool())
    wanted = error_of_refits(evidence, gone, strength)
    assert absorber.price(change) == pytest.approx(wanted, rel=1e-6)


def test_the_inverse_is_that_of_the_kernel_summed_expert_by_expert() -> None:
    evidence = evidence_of(random_weights())
    kernel = torch.zeros(40, 40, dtype=torch.float64)
    energy = 0.0
    for expert in range(6):
        hidden = evidence.activations(expert)
        gate = evidence.gates[:, expert].double()
        kernel += torch.outer(gate, gate) * (hidden @ hidden.T)
        energy += float((gate[:, None] * hidden).square().sum()) / (6 * 5)
    found = torch.linalg.inv(Absorber.of(evidence, 40, 0.1).inverse)
    torch.testing.assert_close(
        found, kernel + 0.1 * energy * torch.eye(40).double(), atol=1e-4, rtol=1e-4
    )


def test_an_expert_that_no_token_visits_is_free_to_drop() -> None:
    absorber, change = without(evidence_of(random_weights(), unvisited=2), 2)
    assert len(change.visits) == 0
    assert absorber.price(change) == 0.0


def test_two_experts_that_no_token_visits_are_free_to_merge() -> None:
    evidence = evidence_of(random_weights(), top_k=1)
    idle = (evidence.gates > 0).sum(0).argsort()[:2].tolist()
    sample = evidence.sample
    keep = (evidence.gates[:, idle] == 0).all(1)
    some = TokenSample(
        sample.states[keep],
        sample.router_logits[keep],
        sample.routing_weights[keep],
        sample.expert_indices[keep],
    )
    quiet = Evidence(sums_of(evidence.weights, some), some, evidence.weights, swiglu)
    absorber, change = without(quiet, *idle)
    assert absorber.price(change) == 0.0


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_copy_is_free_to_merge_with_the_other(kind: dict[str, Any]) -> None:
    evidence = evidence_of(random_weights(**kind).select(torch.tensor([0, 1, 2, 3, 1, 5])))
    absorber, change = without(evidence, 1, 4)
    total = float(evidence.output_sums.plain.square().sum())
    assert absorber.price(change) < 1e-10 * total
    assert absorber.price(without(evidence, 1, 3)[1]) > 1e-4


def test_a_copy_that_always_runs_with_the_other_is_almost_free_to_drop() -> None:
    # The other expert takes up what it did, if its routing weight is in proportion.
    evidence = evidence_of(random_weights(3).select(torch.tensor([0, 1, 1])), 400, top_k=3)
    logits = evidence.sample.router_logits.clone()
    logits[:, 2] = logits[:, 1]
    gates, indices = logits.softmax(1).topk(3)
    sample = TokenSample(evidence.sample.states, logits, gates, indices)
    evidence = Evidence(evidence.sums, sample, evidence.weights, swiglu)
    absorber = Absorber.of(evidence, 400, 1e-4)
    twin, other = (absorber.drop(expert) for expert in (2, 0))
    assert absorber.price(twin) < 1e-6 * float(twin.missing.square().sum())
    assert absorber.price(other) > 1e-3 * float(other.missing.square().sum())


def test_the_order_of_the_experts_does_not_matter() -> None:
    evidence = evidence_of(random_weights())
    order = torch.randperm(6, generator=torch.Generator().manual_seed(4))
    moved = evidence.select(order)
    place = order.argsort().tolist()
    for gone in ((0,), (4,), (2, 5)):
        absorber, change = without(evidence, *gone)
        other, same = without(moved, *(place[e] for e in gone))
        assert other.price(same) == pytest.approx(absorber.price(change), rel=1e-5)


def test_few_tokens_are_taken_evenly_from_the_sample() -> None:
    evidence = evidence_of(random_weights())
    absorber = Absorber.of(evidence, 8, 0.1)
    torch.testing.assert_close(absorber.evidence.sample.states, evidence.sample.states[::5])
    assert absorber.inverse.shape == (8, 8)


def test_a_layer_that_no_token_visits_costs_nothing() -> None:
    evidence = evidence_of(random_weights())
    sample = evidence.sample
    silent = TokenSample(
        sample.states, sample.router_logits, sample.routing_weights * 0, sample.expert_indices
    )
    evidence = Evidence(evidence.sums, silent, evidence.weights, swiglu)
    absorber, change = without(evidence, 1)
    assert absorber.price(change) == 0.0
    assert absorber.price(absorber.merge([0, 1], NeuronPool())) == 0.0


def test_a_shrinkage_that_holds_nothing_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strength=1e-07 must be at least"):
        Absorber.of(evidence_of(random_weights()), 8, 1e-7)
