"""How far apart the experts of one layer are; clustering joins the nearest."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from lightning_smoe.functional.evidence import Evidence


class Distance(ABC):
    """Distance between each two experts of one layer."""

    @abstractmethod
    def __call__(self, evidence: Evidence) -> Float64[Tensor, "experts experts"]:
        """Compares every two experts.

        Args:
            evidence: All that is known of the layer.

        Returns:
            Distances: zero means the same; symmetric, with a zero diagonal.
        """


@dataclass(frozen=True)
class MeanOutput(Distance):
    """Distance between mean outputs over all sampled tokens, routed to the expert or not.

    Source: HC-SMoE, https://arxiv.org/abs/2410.08589.

    Args:
        metric: `euclidean` in hidden-state units, or `cosine` for one minus the cosine.
    """

    metric: Literal["euclidean", "cosine"] = "euclidean"

    def __call__(self, evidence: Evidence) -> Float64[Tensor, "experts experts"]:
        total = evidence.output_sums.plain
        if self.metric == "cosine":
            return tidy(1 - cosines(total @ total.mT))
        mean = total / evidence.sample.num_tokens
        # The matrix-product route of cdist loses half the digits of experts that nearly agree.
        return tidy(torch.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist"))


@dataclass(frozen=True)
class Output(Distance):
    """Root of the mean squared distance between two experts' outputs, over all sampled tokens.

    `sqrt(E_x ||f_i(x) - f_j(x)||^2)` is, up to a constant, the Euclidean distance between the long
    vectors of all outputs, which Sub-MoE (https://arxiv.org/abs/2506.23266, Eq. 3) clusters:
    K-means and Ward on it are exact. Below 3e-4 of the outputs' size it is rounding.
    """

    def __call__(self, evidence: Evidence) -> Float64[Tensor, "experts experts"]:
        gram = evidence.pairs.gram / evidence.sample.num_tokens
        return tidy(squared_distances(gram).sqrt())


@dataclass(frozen=True)
class TokenCosine(Distance):
    """One minus the mean cosine of outputs over all sampled tokens (Sub-MoE, Eq. 2).

    Source: https://arxiv.org/abs/2506.23266.
    """

    def __call__(self, evidence: Evidence) -> Float64[Tensor, "experts experts"]:
        return tidy(1 - evidence.pairs.cosine / evidence.sample.num_tokens)


@dataclass(frozen=True)
class RouterLogit(Distance):
    """One minus the cosine of the router logits of two experts over all tokens (M-SMoE).

    Source: https://arxiv.org/abs/2310.01334. Needs no expert to run.
    """

    def __call__(self, evidence: Evidence) -> Float64[Tensor, "experts experts"]:
        return tidy(1 - cosines(evidence.sums.logit_gram))


def cosines(gram: Float64[Tensor, "experts experts"]) -> Float64[Tensor, "experts experts"]:
    """Turns inner products into cosines, which are zero for a zero vector."""
    norm = gram.diagonal().sqrt()
    scale = torch.outer(norm, norm)
    return torch.where(scale > 0, gram / scale, 0.0)


def squared_distances(
    gram: Float64[Tensor, "experts experts"],
) -> Float64[Tensor, "experts experts"]:
    """Turns inner products into squared distances."""
    energy = gram.diagonal()
    return (energy.unsqueeze(0) + energy.unsqueeze(1) - 2 * gram).clamp(min=0)


def tidy(distance: Float64[Tensor, "experts experts"]) -> Float64[Tensor, "experts experts"]:
    """Removes what rounding did to symmetry, sign and diagonal."""
    return ((distance + distance.mT) / 2).clamp(min=0).fill_diagonal_(0)
