"""One expert made of several by mixing their matrices."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lightning_smoe.functional.experts import ExpertWeights


class Merger(ABC):
    """One expert in place of the members of a group."""

    @abstractmethod
    def __call__(self, members: ExpertWeights, weights: Float[Tensor, " members"]) -> ExpertWeights:
        """Merges the members.

        Args:
            members: Experts of one group, their neurons in a common order.
            weights: Share of each member, at least zero; only ratios matter, all zero is uniform.

        Returns:
            One expert (the experts axis has size 1) in the members' dtype.

        Raises:
            ValueError: A weight is negative or not a number.
        """


@dataclass(frozen=True)
class Average(Merger):
    """Weighted average of each matrix and bias, `sum_i w_i W_i`."""

    def __call__(self, members: ExpertWeights, weights: Float[Tensor, " members"]) -> ExpertWeights:
        shares = _shares(weights)
        return members.map(lambda tensor: _mean(tensor, shares).to(tensor.dtype))


@dataclass(frozen=True)
class UnionSVD(Merger):
    """Weighted average of each matrix within the members' common output basis (Sub-MoE).

    `SVD([W_1 ... W_n]) = U S [V_1 ... V_n]^T`, merged `U S sum_i w_i V_i^T` at the given rank
    (https://arxiv.org/abs/2506.23266, Eq. 5-8). That equals `U U^T sum_i w_i W_i`: the average
    projected on the top singular vectors, and at full rank the plain average. U comes from the
    Gram matrix `sum_i W_i W_i^T`. Biases are averaged.

    Args:
        rank: Singular vectors kept in each matrix, at least 1; none keeps all.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank} keeps nothing of a matrix; take 1 or more, or none")

    def __call__(self, members: ExpertWeights, weights: Float[Tensor, " members"]) -> ExpertWeights:
        shares = _shares(weights)
        return members.map(lambda tensor: self._merge(tensor, shares).to(tensor.dtype))

    def _merge(self, tensor: Float[Tensor, "members ..."], shares: Tensor) -> Tensor:
        if tensor.ndim == 2 or self.rank is None or self.rank >= tensor.shape[1]:
            return _mean(tensor, shares)
        union = tensor.double().transpose(0, 1).flatten(1)
        # The Gram matrix squares singular values: only float64 keeps the small ones apart.
        basis: Tensor = torch.linalg.eigh(union @ union.mT).eigenvectors[:, -self.rank :]
        return basis @ (basis.mT @ _mean(tensor.double(), shares))


def _shares(weights: Float[Tensor, " members"]) -> Float64[Tensor, " members"]:
    """Scales the weights to sum to one."""
    if not bool((weights >= 0).all()):
        raise ValueError(
            f"weights {weights.tolist()} hold a negative number or nan; give each member 0 or more"
        )
    total = weights.double().sum()
    uniform = torch.full_like(weights, 1 / len(weights), dtype=torch.float64)
    return weights.double() / total if total > 0 else uniform


def _mean(
    tensor: Float[Tensor, "members ..."], shares: Float64[Tensor, " members"]
) -> Float[Tensor, "1 ..."]:
    """Averages in float32 or wider."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    shares = shares.to(tensor.device, wide)
    mean: Tensor = torch.tensordot(shares, tensor.to(wide), dims=1)
    return mean.unsqueeze(0)
