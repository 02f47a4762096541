"""Low-rank merging in the directions that matter on calibration tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.merging import (
    Average,
    GroupTokens,
    Merger,
    projected,
    required_tokens,
    union_gram,
    widened,
)

# Energy added to every input, relative to the mean: far above the rounding of float32 products.
_SHRINKAGE = 1e-4


@dataclass(frozen=True)
class WhitenedUnionSVD(Merger):
    """Weighted average of each matrix within the outputs' common main directions (Sub-MoE-dagger).

    With X_i what member i's matrix reads and `S_i = chol(X_i X_i^T + eps I)`:
    `SVD([W_1 S_1 ... W_n S_n]) = U S [V_1 ... V_n]^T`, merged `U S sum_i w_i V_i^T S_i^-1` at the
    given rank (https://arxiv.org/abs/2506.23266, Eq. 10-12). That equals `U U^T sum_i w_i W_i`,
    with U the top eigenvectors of `sum_i W_i (X_i X_i^T + eps I) W_i^T`: the average, projected on
    the main directions of what the matrices put out. No Cholesky factor and no inverse is needed.

    X_i are the tokens routed to member i: their states for `gate_proj` and `up_proj`, for
    `down_proj` the activations times the routing weight, which the paper leaves out. The result is
    one matrix, while the paper keeps two thin ones. Without traffic, and in the limit of many eps,
    it is `UnionSVD`; at full rank it is the plain average. Biases are averaged.

    Args:
        rank: Directions kept in each matrix, at least 1; none keeps all.
    """

    needs_tokens: ClassVar[bool] = True
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank} keeps nothing of a matrix; take 1 or more, or none")

    def __call__(
        self,
        members: ExpertWeights,
        weights: Float[Tensor, " members"],
        tokens: GroupTokens | None = None,
    ) -> ExpertWeights:
        tokens = required_tokens(self, tokens)
        wide = members.map(widened)
        merged = Average()(wide, weights)
        for name in ("gate_proj", "up_proj", "down_proj"):
            mean: Tensor | None = getattr(merged, name)
            if mean is not None and self.rank is not None and self.rank < mean.shape[1]:
                gram = _output_gram(wide, name, tokens)
                merged = replace(merged, **{name: projected(mean, gram, self.rank)})
        return merged.map(lambda tensor: tensor.to(members.up_proj.dtype))


def _output_gram(
    members: ExpertWeights, name: str, tokens: GroupTokens
) -> Float64[Tensor, "outputs outputs"]:
    """Sums `W_i (X_i X_i^T + eps I) W_i^T` over members, eps common to all of them."""
    matrices: Tensor = getattr(members, name)
    size, features = matrices.shape[1:]
    gram = torch.zeros(size, size, dtype=torch.float64, device=matrices.device)
    energy = torch.zeros((), dtype=torch.float64, device=matrices.device)
    for member, inputs in _routed_inputs(members, name, tokens):
        outputs = inputs @ matrices[member].T
        gram += outputs.T @ outputs
        energy += inputs.double().square().sum() / features
    # Without any token what is left is the plain union's.
    added = torch.where(energy > 0, _SHRINKAGE * energy, 1.0)
    return gram + added * union_gram(matrices)


def _routed_inputs(
    members: ExpertWeights, name: str, tokens: GroupTokens
) -> Iterator[tuple[int, Float[Tensor, "tokens features"]]]:
    """Goes through what one matrix of each member reads, a block of tokens at a time."""
    for member in range(len(members.up_proj)):
        for block in tokens.visiting(member).blocks():
            if name == "down_proj":
                hidden = members.activations(block.states, member, block.activate)
                yield member, hidden * block.gates[:, member, None].to(hidden.dtype)
            else:
                yield member, block.states.to(members.up_proj.dtype)
