"""Distances between the weights of experts: nothing is run."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import combinations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lightning_smoe.functional.alignment import align_neurons
from lightning_smoe.functional.distance import Distance, squared_distances, tidy
from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.experts import ExpertWeights

# Numbers of one block of all experts' weights: 16 MB in float32.
_BLOCK_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Weight(Distance):
    """Frobenius distance between all matrices and biases of two experts.

    One of the signals compared by HC-SMoE (https://arxiv.org/abs/2410.08589) and Sub-MoE
    (https://arxiv.org/abs/2506.23266); worse than outputs in both. As stored, it is one matrix
    product over all weights. Aligned, each of the E (E - 1) / 2 pairs takes the inner products of
    its neurons, O(F^2 D), and an assignment of F neurons, O(F^3): on one core some seconds for 60
    experts of width 64, twenty minutes for 60 of width 1408.

    Args:
        align: Whether the neurons of each two are first put in the order that brings them closest,
            as the order of neurons does not change what an expert does.
    """

    align: bool = False

    def __call__(self, evidence: Evidence) -> Float64[Tensor, "experts experts"]:
        squared = _aligned(evidence.weights) if self.align else _as_stored(evidence.weights)
        return tidy(squared.sqrt())


def _as_stored(weights: ExpertWeights) -> Float64[Tensor, "experts experts"]:
    """Squared distances between weights, neuron by neuron."""
    experts = len(weights.up_proj)
    gram = torch.zeros(experts, experts, dtype=torch.float64, device=weights.up_proj.device)
    for rows in (tensor.flatten(1) for tensor in _tensors(weights)):
        for block in rows.split(max(1, _BLOCK_NUMBERS // experts), dim=1):
            # Distances between experts with a common ancestor would drown in what they share.
            own = _precise(block)
            own = own - own.mean(0)
            gram += own @ own.mT
    return squared_distances(gram)


def _aligned(weights: ExpertWeights) -> Float64[Tensor, "experts experts"]:
    """Squared distances between weights, each two experts' neurons in a common order."""
    experts, device = len(weights.up_proj), weights.up_proj.device
    squared = torch.zeros(experts, experts, dtype=torch.float64, device=device)
    for first, second in combinations(range(experts), 2):
        pair = weights.select(torch.tensor([first, second], device=device))
        parts = [_precise(tensor) for tensor in _tensors(align_neurons(pair, reference=0))]
        total = sum((part[0] - part[1]).square().sum(dtype=torch.float64) for part in parts)
        squared[first, second] = squared[second, first] = total
    return squared


def _tensors(weights: ExpertWeights) -> Iterator[Float[Tensor, "experts ..."]]:
    present = (getattr(weights, field.name) for field in fields(weights))
    return (tensor for tensor in present if tensor is not None)


def _precise(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
