"""One expert made of several by nonlinear mixing of their matrices, without tokens."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.merging import Average, GroupTokens, Merger, shares_of, widened

# Steps to the Karcher mean; from members within 90 degrees about ten reach the tolerance.
_MAX_STEPS = 100
# Radians: float64 gives no smaller angle between equal vectors, float32 weights show none.
_TOLERANCE = 1e-7
# Length of a mean of unit vectors below which they cancel out and it has no direction.
_SMALLEST_MEAN = 1e-6
# Norm below which a vector has no direction; far under any float32 weight that matters.
_SMALLEST_NORM = 1e-20


@dataclass(frozen=True)
class Karcher(Merger):
    """Weighted mean on the sphere, as long as the members are on average (SLERP of several).

    The directions u_i of the members' vectors have the mean m that minimises
    `sum_i w_i angle(m, u_i)^2`, found by `m <- exp_m(sum_i w_i log_m(u_i))` from their normalised
    average; merged `m sum_i w_i ||v_i||`. Two members give spherical linear interpolation
    (https://doi.org/10.1145/325334.325242); of several it is mergekit's `karcher`
    (https://arxiv.org/abs/2403.13257). An average of unrelated vectors is shorter than they are;
    this is not, and therefore amplifies what they have in common. Where members cancel out, the
    heaviest gives the direction. Biases are averaged.

    Args:
        vector: What has a direction of its own: a neuron's row in `gate_proj`, its row in `up_proj`
            and its column in `down_proj`; or, as in mergekit, each whole matrix.
    """

    vector: Literal["neuron", "matrix"] = "neuron"

    def __call__(
        self,
        members: ExpertWeights,
        weights: Float[Tensor, " members"],
        tokens: GroupTokens | None = None,
    ) -> ExpertWeights:
        merged = Average()(members, weights)
        gate, dtype = members.gate_proj, members.up_proj.dtype
        down = self._merge(members.down_proj.mT, weights).mT
        return replace(
            merged,
            gate_proj=None if gate is None else self._merge(gate, weights).to(dtype),
            up_proj=self._merge(members.up_proj, weights).to(dtype),
            down_proj=down.contiguous().to(dtype),
        )

    def _merge(
        self,
        neurons: Float[Tensor, "members intermediate hidden"],
        weights: Float[Tensor, " members"],
    ) -> Float64[Tensor, "1 intermediate hidden"]:
        shares = shares_of(weights).to(neurons.device)
        vectors = neurons.double()
        if self.vector == "matrix":
            vectors = vectors.flatten(1).unsqueeze(1)
        norms = vectors.norm(dim=2)
        units = vectors / norms.clamp_min(_SMALLEST_NORM).unsqueeze(2)
        mean = _karcher_mean(torch.einsum("ivd,jvd->vij", units, units), shares)
        merged = torch.einsum("vi,ivd->vd", mean * (shares @ norms).unsqueeze(1), units)
        return merged.view(1, *neurons.shape[1:])


def _karcher_mean(
    cosines: Float64[Tensor, "vectors members members"], shares: Float64[Tensor, " members"]
) -> Float64[Tensor, "vectors members"]:
    """Finds the mean of unit vectors, as a mixture of them, from their cosines alone."""

    def length(mixture: Tensor) -> Tensor:
        square = torch.einsum("vi,vij,vj->v", mixture, cosines, mixture)
        return square.clamp_min(0).sqrt().unsqueeze(1)

    mean = shares.expand(len(cosines), -1)
    heaviest = torch.eye(len(shares), dtype=shares.dtype, device=shares.device)[shares.argmax()]
    mean = torch.where(length(mean) > _SMALLEST_MEAN, mean, heaviest)
    for _ in range(_MAX_STEPS):
        mean = mean / length(mean).clamp_min(_SMALLEST_MEAN)
        cosine = torch.einsum("vij,vj->vi", cosines, mean).clamp(-1, 1)
        # The angle by its sine: at 180 degrees there is no way to go, here it is a long one.
        pull = shares / torch.sinc(cosine.acos() / torch.pi).clamp_min(_SMALLEST_MEAN)
        step = pull - (pull * cosine).sum(1, keepdim=True) * mean
        angle = length(step)
        mean = angle.cos() * mean + torch.sinc(angle / torch.pi) * step
        if not bool((angle > _TOLERANCE).any()):
            break
    return mean / length(mean).clamp_min(_SMALLEST_MEAN)


@dataclass(frozen=True)
class Ties(Merger):
    """The heaviest member plus the large differences to it that the others agree on (TIES).

    Of each other member's `tau_i = W_i - W_d` only the largest entries stay; the sign of
    `sum_i w_i tau_i` is elected entry by entry; the merged matrix is W_d plus the weighted mean
    difference of the members that have this sign (https://arxiv.org/abs/2306.01708). Biases alike.

    The paper merges fine-tuned copies of one ancestor, which experts do not have. The heaviest
    member stands in for it, as in REAP's code (which subtracts the differences instead of adding
    them): around the mean, two members would cancel out everywhere, and around zero a sparse copy
    of an expert would take its place. The heaviest member counts in the mean, with a difference of
    zero: where all agree and nothing is cut off, the result is the weighted average.

    Args:
        density: Fraction of the entries of each difference that stays, in (0, 1].
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} must be above 0 and at most 1")

    def __call__(
        self,
        members: ExpertWeights,
        weights: Float[Tensor, " members"],
        tokens: GroupTokens | None = None,
    ) -> ExpertWeights:
        shares = shares_of(weights).to(members.up_proj.device)
        return members.map(lambda tensor: self._merge(tensor, shares).to(tensor.dtype))

    def _merge(
        self, tensor: Float[Tensor, "members ..."], shares: Float64[Tensor, " members"]
    ) -> Float[Tensor, "1 ..."]:
        wide = widened(tensor)
        heaviest = int(shares.argmax())
        changes = (wide - wide[heaviest]).flatten(1)
        cut = changes.shape[1] - math.ceil(self.density * changes.shape[1])
        if cut:
            threshold = changes.abs().kthvalue(cut + 1, dim=1, keepdim=True).values
            changes[changes.abs() < threshold] = 0
        share = shares.to(wide.dtype).unsqueeze(1)
        votes = share * changes
        agree = votes.sign() == votes.sum(0).sign()
        counted = (share * agree).sum(0) + torch.where(agree[heaviest], 0, share[heaviest])
        mean = (votes * agree).sum(0) / counted.clamp_min(_SMALLEST_MEAN)
        return wide[heaviest : heaviest + 1] + mean.view(1, *tensor.shape[1:])
