"""Experts with their intermediate neurons in a common order, so that they can be averaged."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.merging import GroupTokens, required_tokens, widened

# Standard deviation below which an activation never changes; far under any that matters.
_SMALLEST_DEVIATION = 1e-20

# How much every neuron of the reference and every neuron of one member, given by its index, match.
_Similarity = Callable[[int], Float[Tensor, "intermediate intermediate"]]


class Alignment(ABC):
    """Order of the members' neurons that makes them comparable one by one.

    Attributes:
        needs_tokens: Whether it looks at calibration tokens.
    """

    needs_tokens: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self, members: ExpertWeights, reference: int, tokens: GroupTokens | None = None
    ) -> ExpertWeights:
        """Permutes every member's neurons to match the reference's; no member's function changes.

        The matching maximises the sum of similarities (linear assignment: time grows with the cube
        of the number of neurons).

        Args:
            members: Experts that are to be merged.
            reference: Index of the member whose order of neurons stays.
            tokens: What the group saw; none if not needed.

        Returns:
            The members, their neurons reordered.

        Raises:
            ValueError: Tokens are needed and there are none.
        """


@dataclass(frozen=True)
class ByWeights(Alignment):
    """Matches neurons by the inner product of their weights.

    A neuron is its gate row, up row, their biases and its down column (weight matching of M-SMoE,
    https://arxiv.org/abs/2310.01334).
    """

    def __call__(
        self, members: ExpertWeights, reference: int, tokens: GroupTokens | None = None
    ) -> ExpertWeights:
        return _aligned(members, reference, _by_weights(members, reference))


@dataclass(frozen=True)
class ByActivations(Alignment):
    """Matches neurons by the correlation of their activations on tokens that visit the group.

    REAM (https://arxiv.org/abs/2604.04356) compares activations on all tokens, scaled but not
    centred. Neurons whose activation never changes are matched at random, as none fits them; a
    group that no token visits keeps its order. Holds the activations of two experts at a time.
    """

    needs_tokens: ClassVar[bool] = True

    def __call__(
        self, members: ExpertWeights, reference: int, tokens: GroupTokens | None = None
    ) -> ExpertWeights:
        tokens = required_tokens(self, tokens)
        return _aligned(members, reference, _by_activations(members, reference, tokens))


@dataclass(frozen=True)
class ByBoth(Alignment):
    """Matches neurons by their weights and their activations alike.

    The similarities of `ByWeights` and `ByActivations`, each divided by its standard deviation over
    all pairs of neurons, are added. REAM (https://arxiv.org/abs/2604.04356) adds distances of
    vectors scaled to length one instead, those of weights after a PCA to 64 dimensions.
    """

    needs_tokens: ClassVar[bool] = True

    def __call__(
        self, members: ExpertWeights, reference: int, tokens: GroupTokens | None = None
    ) -> ExpertWeights:
        tokens = required_tokens(self, tokens)
        weights = _by_weights(members, reference)
        activations = _by_activations(members, reference, tokens)
        return _aligned(
            members, reference, lambda m: _standardised(weights(m)) + _standardised(activations(m))
        )


def align_neurons(members: ExpertWeights, reference: int) -> ExpertWeights:
    """Permutes every member's neurons to match the reference's, by weights; see `ByWeights`.

    Args:
        members: Experts that are to be merged.
        reference: Index of the member whose order of neurons stays.

    Returns:
        The members, their neurons reordered.
    """
    return ByWeights()(members, reference)


def _by_weights(members: ExpertWeights, reference: int) -> _Similarity:
    target = _neurons(members, reference)
    return lambda member: target @ _neurons(members, member).mT


def _by_activations(members: ExpertWeights, reference: int, tokens: GroupTokens) -> _Similarity:
    wide, routed = members.map(widened), tokens.routed()

    def deviations(member: int) -> Tensor:
        values = wide.activations(routed.states, member, routed.activate)
        values = values - values.mean(0)
        norm: Tensor = values.norm(dim=0)
        return values / norm.clamp_min(_SMALLEST_DEVIATION)

    target = deviations(reference)
    return lambda member: target.mT @ deviations(member)


def _standardised(
    similarity: Float[Tensor, "intermediate intermediate"],
) -> Float[Tensor, "intermediate intermediate"]:
    deviation = similarity.std(correction=0).clamp_min(_SMALLEST_DEVIATION)
    return (similarity - similarity.mean()) / deviation


def _neurons(members: ExpertWeights, member: int) -> Float[Tensor, "intermediate features"]:
    """Lays out all that belongs to each neuron of one member in a row."""
    rows = [members.gate_proj, members.up_proj, members.gate_bias, members.up_bias]
    parts = [tensor[member] for tensor in rows if tensor is not None]
    parts.append(members.down_proj[member].mT)
    joined = torch.cat([part.unsqueeze(1) if part.ndim == 1 else part for part in parts], dim=1)
    return widened(joined)


def _aligned(members: ExpertWeights, reference: int, similarity: _Similarity) -> ExpertWeights:
    count, width = members.up_proj.shape[:2]
    order = [
        torch.arange(width) if member == reference else _matching(similarity(member))
        for member in range(count)
    ]
    return _reordered(members, torch.stack(order).to(members.up_proj.device))


def _matching(
    similarity: Float[Tensor, "intermediate intermediate"],
) -> Int64[Tensor, " intermediate"]:
    """Finds the neuron to put at each place of the reference."""
    from scipy.optimize import linear_sum_assignment

    _, chosen = linear_sum_assignment(similarity.numpy(force=True), maximize=True)
    return torch.tensor(chosen.tolist())


def _reordered(
    members: ExpertWeights, order: Int64[Tensor, "members intermediate"]
) -> ExpertWeights:
    # A member at a time: rows are copied whole, where an index over all members takes each number
    # by itself.
    def reordered(tensor: Tensor, axis: int = 0) -> Tensor:
        pairs = zip(tensor, order, strict=True)
        return torch.stack([one.index_select(axis, places) for one, places in pairs])

    def where_there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else reordered(tensor)

    return ExpertWeights(
        up_proj=reordered(members.up_proj),
        down_proj=reordered(members.down_proj, axis=1),
        gate_proj=where_there(members.gate_proj),
        gate_bias=where_there(members.gate_bias),
        up_bias=where_there(members.up_bias),
        down_bias=members.down_bias,
    )
