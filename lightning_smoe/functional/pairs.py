"""Sums over a sample of tokens of what all experts put out: one by one, and in pairs."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Norm below which an output counts as zero: far under any activation that matters, and its
# square is still a normal float32.
_SMALLEST_NORM = 1e-18
# Numbers of one table of all pairs for a few tokens: 1 MB in float32, which caches hold.
_TABLE_NUMBERS = 1 << 18
# Tokens that are added up in the precision of the outputs before they join a float64 sum: too few
# to lose digits, while adding single tokens in float64 takes ten times longer.
_FEW_TOKENS = 256


@dataclass(frozen=True, eq=False)
class OutputSums:
    """Sums over tokens, routed to the experts or not; f(x) is an output before its routing weight.

    Args:
        plain: Sum of f(x).
        weighted: Sum of p f(x), with p the softmax of the router's logits over all experts.
    """

    plain: Float64[Tensor, "experts hidden"]
    weighted: Float64[Tensor, "experts hidden"]

    @staticmethod
    def zeros(num_experts: int, hidden_size: int, device: torch.device) -> "OutputSums":
        """Sums over no tokens."""
        shape = (2, num_experts, hidden_size)
        return OutputSums(*torch.zeros(shape, dtype=torch.float64, device=device))

    def add(
        self,
        outputs: Float[Tensor, "experts tokens hidden"],
        router_probs: Float[Tensor, "tokens experts"],
    ) -> None:
        """Adds tokens, in place."""
        for part, probs in _parts(outputs, router_probs, _FEW_TOKENS):
            self.plain.add_(part.sum(1))
            self.weighted.add_((probs.mT.unsqueeze(1) @ part).squeeze(1))


@dataclass(frozen=True, eq=False)
class PairSums:
    """Sums over tokens, routed to the experts or not; f(x) is an output before its routing weight.

    One matrix product a token, `f_i(x) . f_j(x)`, in the precision of the outputs, gives them all;
    tokens are added up in float64. A squared distance is `||f_i||^2 + ||f_j||^2 - 2 f_i . f_j`: for
    float32 outputs it is known to about 1e-7 of their energy, so two experts that differ by less
    than 3e-4 of their size look equal, or as different as that.

    Args:
        gram: Sum of f_i(x) . f_j(x).
        cosine: Sum of cos(f_i(x), f_j(x)), which is 0 where an output is zero.
        gated_gram: Sum of g_i g_j f_i(x) . f_j(x), with g zero for tokens not routed to the expert.
        own_distance: Sum of g_i^2 ||f_i(x) - f_j(x)||^2.
        joint_distance: Sum of g_i g_j ||f_i(x) - f_j(x)||^2.
    """

    gram: Float64[Tensor, "experts experts"]
    cosine: Float64[Tensor, "experts experts"]
    gated_gram: Float64[Tensor, "experts experts"]
    own_distance: Float64[Tensor, "experts experts"]
    joint_distance: Float64[Tensor, "experts experts"]

    @staticmethod
    def zeros(num_experts: int, device: torch.device) -> "PairSums":
        """Sums over no tokens."""
        shape = (5, num_experts, num_experts)
        return PairSums(*torch.zeros(shape, dtype=torch.float64, device=device))

    def add(
        self,
        outputs: Float[Tensor, "experts tokens hidden"],
        gates: Float[Tensor, "tokens experts"],
    ) -> None:
        """Adds tokens, in place: one product of outputs per token, summed five ways."""
        size = max(1, _TABLE_NUMBERS // len(outputs) ** 2)
        for part, gate in _parts(outputs, gates, size):
            by_token = part.transpose(0, 1)
            gram = by_token @ by_token.mT
            energy = gram.diagonal(dim1=1, dim2=2)
            # Below zero it is rounding, and would break |joint|^2 <= own_i own_j.
            distance = (energy.unsqueeze(2) + energy.unsqueeze(1) - 2 * gram).clamp_(min=0)
            inverse_norm = energy.sqrt().clamp_min(_SMALLEST_NORM).reciprocal()
            joint = _outer(gate)
            self.gram.add_(gram.sum(0, dtype=torch.float64))
            self.cosine.add_((gram * _outer(inverse_norm)).sum(0, dtype=torch.float64))
            self.gated_gram.add_((gram * joint).sum(0, dtype=torch.float64))
            own = gate.square().unsqueeze(2)
            self.own_distance.add_((distance * own).sum(0, dtype=torch.float64))
            self.joint_distance.add_((distance * joint).sum(0, dtype=torch.float64))


def _outer(by_token: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts experts"]:
    return by_token.unsqueeze(2) * by_token.unsqueeze(1)


def _parts(
    outputs: Float[Tensor, "experts tokens hidden"],
    by_token: Float[Tensor, "tokens experts"],
    size: int,
) -> Iterator[tuple[Float[Tensor, "experts block hidden"], Float[Tensor, "block experts"]]]:
    """Splits the tokens of both in the same places."""
    yield from zip(outputs.split(size, dim=1), by_token.split(size), strict=True)
