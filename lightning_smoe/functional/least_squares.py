"""One expert made of several by fits to what the members computed on calibration tokens."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_smoe.functional.affine import (
    features_of,
    input_map,
    output_map,
    with_input_map,
    with_output_map,
)
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.merging import (
    Average,
    GroupTokens,
    Merger,
    required_tokens,
    shares_of,
    widened,
)
from lightning_smoe.functional.moments import Moments
from lightning_smoe.functional.refit import check_strength, ridge_toward


@dataclass(frozen=True)
class RegMean(Merger):
    """Each matrix fitted to the members' on the tokens routed to them (RegMean).

    `W = (sum_j W_j G_j + lam W_0) (sum_j G_j + lam I)^-1`, with G_j the Gram matrix of what W_j
    reads when a token is routed to member j: states x for `gate_proj` and `up_proj`, weighted
    activations g_j h_j for `down_proj` (https://arxiv.org/abs/2212.09849). It is the minimum
    of `sum_j sum_x ||W x - W_j x||^2 + lam ||W - W_0||^2`. The paper steadies the inverse by
    scaling off-diagonal entries of G_j; here the ridge toward the weighted average W_0 does, which
    a group without traffic therefore becomes. The paper averages biases; here each is fitted with
    its matrix. The members' weights count in W_0 only: elsewhere, tokens do.

    Args:
        strength: lam relative to the mean energy of an input, at least 1e-6.
    """

    needs_tokens: ClassVar[bool] = True
    strength: float = 0.1

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def __call__(
        self,
        members: ExpertWeights,
        weights: Float[Tensor, " members"],
        tokens: GroupTokens | None = None,
    ) -> ExpertWeights:
        wide = members.map(widened)
        start = Average()(wide, weights)
        reads, writes = _regressions(wide, start, required_tokens(self, tokens))
        merged = with_input_map(start, _fitted(input_map(start), reads, self.strength))
        merged = with_output_map(merged, _fitted(output_map(start), writes, self.strength))
        return merged.map(lambda tensor: tensor.to(members.up_proj.dtype))


@dataclass(frozen=True)
class LeastSquares(Merger):
    """Output matrix fitted to the members' weighted mean output on all tokens (MergeMoE).

    With h the activations of the start merger's `gate_proj` and `up_proj`, and b the members'
    shares: `W = W_0 + sum_x (t - W_0 h) h^T (sum_x h h^T + lam I)^-1, t = sum_j b_j f_j(x)`
    (https://arxiv.org/abs/2510.14436; the paper takes lam = 0, and W within the span of
    the members' output matrices, where the unconstrained fit lies too). The ridge pulls toward the
    start merger's output matrix W_0: without it the fit is worse than the average on few tokens. A
    bias of the output is fitted along.

    Args:
        start: Gives `gate_proj`, `up_proj` and W_0.
        strength: lam relative to the mean energy of an activation, at least 1e-6.
    """

    needs_tokens: ClassVar[bool] = True
    start: Merger = Average()
    strength: float = 0.1

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def __call__(
        self,
        members: ExpertWeights,
        weights: Float[Tensor, " members"],
        tokens: GroupTokens | None = None,
    ) -> ExpertWeights:
        tokens = required_tokens(self, tokens)
        shares = shares_of(weights).to(tokens.gates.device, tokens.gates.dtype)
        as_if_mixed = replace(tokens, gates=shares.expand(len(tokens.states), -1))
        return _refitted(self, members, weights, tokens, fit_to=as_if_mixed)


@dataclass(frozen=True)
class RoutedLeastSquares(Merger):
    """Output matrix fitted to what the group really added to its tokens' states.

    With h the activations of the start merger's `gate_proj` and `up_proj`, g the routing weights
    and s their sum over the group: the minimum of
    `sum_x ||sum_j g_j f_j(x) - s W h||^2 + lam ||W - W_0||^2`. That is `LeastSquares` (MergeMoE,
    https://arxiv.org/abs/2510.14436) with the actual mixture in place of a fixed one, on the tokens
    that visit the group, by their weight. It supposes that the merged expert's routing weight is s
    (the `map` router, or one close to it). A group without traffic becomes the start merger's. A
    bias of the output is fitted along.

    Args:
        start: Gives `gate_proj`, `up_proj` and W_0.
        strength: lam relative to the mean energy of an activation, at least 1e-6.
    """

    needs_tokens: ClassVar[bool] = True
    start: Merger = Average()
    strength: float = 0.1

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def __call__(
        self,
        members: ExpertWeights,
        weights: Float[Tensor, " members"],
        tokens: GroupTokens | None = None,
    ) -> ExpertWeights:
        tokens = required_tokens(self, tokens)
        return _refitted(self, members, weights, tokens, fit_to=tokens.routed())


def _regressions(
    members: ExpertWeights, start: ExpertWeights, tokens: GroupTokens
) -> tuple[Moments, Moments]:
    """Sums what each member's maps read, and how far its results are from the start's."""
    read_changes = input_map(members) - input_map(start)
    write_changes = output_map(members) - output_map(start)
    reads, writes = _no_moments(read_changes), _no_moments(write_changes)
    for member in range(len(members.up_proj)):
        for block in tokens.visiting(member).blocks():
            states = block.states.to(read_changes.dtype)
            read = features_of(states, members.up_bias)
            reads.add(read, read @ read_changes[member].T)
            hidden = members.activations(states, member, block.activate)
            written = block.gates[:, member, None] * features_of(hidden, members.down_bias)
            written = written.to(write_changes.dtype)
            writes.add(written, written @ write_changes[member].T)
    return reads, writes


def _refitted(
    merger: LeastSquares | RoutedLeastSquares,
    members: ExpertWeights,
    weights: Float[Tensor, " members"],
    tokens: GroupTokens,
    *,
    fit_to: GroupTokens,
) -> ExpertWeights:
    """Merges as the start merger does, then fits the output map to what these tokens get."""
    wide = members.map(widened)
    start = merger.start(wide, weights, tokens)
    merged = _with_fitted_output(wide, start, fit_to, merger.strength)
    return merged.map(lambda tensor: tensor.to(members.up_proj.dtype))


def _with_fitted_output(
    members: ExpertWeights, start: ExpertWeights, tokens: GroupTokens, strength: float
) -> ExpertWeights:
    """Fits the output map so that the start, times the summed gates, gives the gated outputs."""
    first = output_map(start)
    moments = _no_moments(first)
    for block in tokens.blocks():
        hidden = start.activations(block.states, 0, block.activate)
        gates = block.gates.to(hidden.dtype)
        written = gates.sum(1, keepdim=True) * features_of(hidden, start.down_bias)
        residual = written @ -first[0].T
        for member in range(len(members.up_proj)):
            visits = gates[:, member].ne(0).nonzero().squeeze(1)
            outputs = members.outputs(block.states[visits], member, block.activate)
            residual.index_add_(0, visits, gates[visits, member, None] * outputs)
        moments.add(written, residual)
    return with_output_map(start, _fitted(first, moments, strength))


def _no_moments(maps: Float[Tensor, "experts outputs features"]) -> Moments:
    return Moments.zeros(maps.shape[2], maps.shape[1], maps.device)


def _fitted(
    start: Float[Tensor, "1 outputs features"], residuals: Moments, strength: float
) -> Float[Tensor, "1 outputs features"]:
    """Adds the ridge fit of the residuals: nothing, to the last bit, where they are zero."""
    nothing = torch.zeros_like(start[0], dtype=torch.float64)
    change = ridge_toward(nothing, residuals.gram, residuals.cross, strength)
    return (start.double() + change).to(start.dtype)
