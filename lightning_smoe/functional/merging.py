"""One expert made of several by mixing their matrices."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lightning_smoe.functional.experts import Activation, ExpertWeights

# Tokens that a fit looks at in one go: 4096 activations of 14336 neurons in float32 are 235 MB.
_BLOCK_TOKENS = 4096
# Row blocks of a symmetric product, of which what lies above the diagonal is left out: 10 of 16.
_GRAM_BLOCKS = 4


@dataclass(frozen=True, eq=False)
class GroupTokens:
    """Calibration tokens as one group of experts sees them.

    Args:
        states: What the experts read, for every token, also those not routed to the group.
        gates: Routing weight of each member for each token, zero where it is not selected.
        activate: The experts' activation.
    """

    states: Float[Tensor, "tokens hidden"]
    gates: Float[Tensor, "tokens members"]
    activate: Activation

    def routed(self) -> "GroupTokens":
        """Leaves out the tokens that visit no member."""
        return self._where(self.gates.ne(0).any(1))

    def visiting(self, member: int) -> "GroupTokens":
        """Leaves out the tokens that do not visit one member."""
        return self._where(self.gates[:, member].ne(0))

    def blocks(self) -> Iterator["GroupTokens"]:
        """Goes through the tokens, a few thousand at a time."""
        for start in range(0, len(self.states), _BLOCK_TOKENS):
            yield self._where(slice(start, start + _BLOCK_TOKENS))

    def _where(self, tokens: Tensor | slice) -> "GroupTokens":
        return replace(self, states=self.states[tokens], gates=self.gates[tokens])


class Merger(ABC):
    """One expert in place of the members of a group.

    Attributes:
        needs_tokens: Whether it is fitted on calibration tokens.
    """

    needs_tokens: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self,
        members: ExpertWeights,
        weights: Float[Tensor, " members"],
        tokens: GroupTokens | None = None,
    ) -> ExpertWeights:
        """Merges the members.

        Args:
            members: Experts of one group, their neurons in a common order.
            weights: Share of each member, at least zero; only ratios matter, all zero is uniform.
            tokens: What the group saw; none if not needed.

        Returns:
            One expert (the experts axis has size 1) in the members' dtype.

        Raises:
            ValueError: A weight is negative or not a number, or tokens are needed and there are
                none.
        """


@dataclass(frozen=True)
class Dominant(Merger):
    """The heaviest member as it is, of several equally heavy ones the first."""

    def __call__(
        self,
        members: ExpertWeights,
        weights: Float[Tensor, " members"],
        tokens: GroupTokens | None = None,
    ) -> ExpertWeights:
        heaviest = shares_of(weights).argmax()
        return members.select(heaviest.view(1).to(members.up_proj.device))


@dataclass(frozen=True)
class Average(Merger):
    """Weighted average of each matrix and bias, `sum_i w_i W_i`."""

    def __call__(
        self,
        members: ExpertWeights,
        weights: Float[Tensor, " members"],
        tokens: GroupTokens | None = None,
    ) -> ExpertWeights:
        shares = shares_of(weights)
        return members.map(lambda tensor: mean_of(tensor, shares).to(tensor.dtype))


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

    def __call__(
        self,
        members: ExpertWeights,
        weights: Float[Tensor, " members"],
        tokens: GroupTokens | None = None,
    ) -> ExpertWeights:
        shares = shares_of(weights)
        return members.map(lambda tensor: self._merge(tensor, shares).to(tensor.dtype))

    def _merge(self, tensor: Float[Tensor, "members ..."], shares: Tensor) -> Tensor:
        if tensor.ndim == 2 or self.rank is None or self.rank >= tensor.shape[1]:
            return mean_of(tensor, shares)
        return projected(mean_of(tensor, shares), union_gram(tensor), self.rank)


def union_gram(
    matrices: Float[Tensor, "members outputs features"],
) -> Float64[Tensor, "outputs outputs"]:
    """Sums `W_i W_i^T` over members, each product in the matrices' precision or float32.

    Rounding of float32 hides singular values below 3e-4 of the largest: what they add to a matrix
    is less than what a rank that cuts there leaves out.
    """
    size = matrices.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=matrices.device)
    block = -(-size // _GRAM_BLOCKS)
    for matrix in map(widened, matrices):
        for start in range(0, size, block):
            end = start + block
            gram[start:end, :end] += matrix[start:end] @ matrix[:end].mT
    return gram.tril() + gram.tril(-1).mT


def projected(
    matrices: Float[Tensor, "1 outputs features"],
    gram: Float64[Tensor, "outputs outputs"],
    rank: int,
) -> Float[Tensor, "1 outputs features"]:
    """Projects the outputs on the Gram matrix's top eigenvectors, which are found in float64."""
    basis: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -rank:].to(matrices.dtype)
    return basis @ (basis.mT @ matrices)


def required_tokens(strategy: object, tokens: GroupTokens | None) -> GroupTokens:
    """Returns the tokens that a strategy needs.

    Raises:
        ValueError: There are none.
    """
    if tokens is None:
        raise ValueError(
            f"{type(strategy).__name__} is fitted on calibration tokens; give it what the group saw"
        )
    return tokens


def widened(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Converts half precision to float32 and leaves wider numbers alone."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def shares_of(weights: Float[Tensor, " members"]) -> Float64[Tensor, " members"]:
    """Scales the weights to sum to one; weights that are all zero become equal.

    Raises:
        ValueError: A weight is negative or not a number.
    """
    if not bool((weights >= 0).all()):
        raise ValueError(
            f"weights {weights.tolist()} hold a negative number or nan; give each member 0 or more"
        )
    total = weights.double().sum()
    uniform = torch.full_like(weights, 1 / len(weights), dtype=torch.float64)
    return weights.double() / total if total > 0 else uniform


def mean_of(
    tensor: Float[Tensor, "members ..."], shares: Float64[Tensor, " members"]
) -> Float[Tensor, "1 ..."]:
    """Averages over members in float32 or wider."""
    wide = widened(tensor)
    mean: Tensor = torch.tensordot(shares.to(wide.device, wide.dtype), wide, dims=1)
    return mean.unsqueeze(0)
