"""How far apart the experts of one layer are, from its sums; clustering joins the nearest."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from lightning_smoe.functional.sums import ExpertSums


class Distance(ABC):
    """Distance between each two experts of one layer.

    Attributes:
        needs_all_experts: Whether calibration must run every expert on every token for it.
    """

    needs_all_experts: ClassVar[bool]

    @abstractmethod
    def __call__(self, sums: ExpertSums) -> Float64[Tensor, "experts experts"]:
        """Compares every two experts.

        Args:
            sums: Sums of one layer without a domain axis.

        Returns:
            Distances: zero means the same; symmetric, with a zero diagonal.

        Raises:
            ValueError: The distance needs sums over all tokens and calibration gathered none.
        """


@dataclass(frozen=True)
class MeanOutput(Distance):
    """Distance between mean outputs over all tokens (HC-SMoE, https://arxiv.org/abs/2410.08589).

    Args:
        metric: `euclidean` in hidden-state units, or `cosine` for one minus the cosine.
    """

    needs_all_experts: ClassVar[bool] = True
    metric: Literal["euclidean", "cosine"] = "euclidean"

    def __call__(self, sums: ExpertSums) -> Float64[Tensor, "experts experts"]:
        total = _over_all_tokens(self, sums.output_sum)
        if self.metric == "cosine":
            return _one_minus_cosine(total @ total.mT)
        mean = total / sums.num_tokens
        # The matrix-product route of cdist loses half the digits of experts that nearly agree.
        return _tidy(torch.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist"))


@dataclass(frozen=True)
class Output(Distance):
    """Root of the mean squared distance between two experts' outputs, over all tokens.

    `sqrt(E_x ||f_i(x) - f_j(x)||^2)` is, up to a constant, the Euclidean distance between the long
    vectors of all outputs, which Sub-MoE (https://arxiv.org/abs/2506.23266, Eq. 3) clusters:
    K-means and Ward on it are exact. Below 1e-8 of the outputs' size it is rounding.
    """

    needs_all_experts: ClassVar[bool] = True

    def __call__(self, sums: ExpertSums) -> Float64[Tensor, "experts experts"]:
        gram = _over_all_tokens(self, sums.output_gram) / sums.num_tokens
        energy = gram.diagonal()
        squared = energy.unsqueeze(0) + energy.unsqueeze(1) - 2 * gram
        return _tidy(squared.clamp(min=0).sqrt())


@dataclass(frozen=True)
class TokenCosine(Distance):
    """One minus the mean cosine of outputs over all tokens (Sub-MoE, Eq. 2).

    Source: https://arxiv.org/abs/2506.23266.
    """

    needs_all_experts: ClassVar[bool] = True

    def __call__(self, sums: ExpertSums) -> Float64[Tensor, "experts experts"]:
        return _tidy(1 - _over_all_tokens(self, sums.output_cosine) / sums.num_tokens)


@dataclass(frozen=True)
class RouterLogit(Distance):
    """One minus the cosine of the router logits of two experts over tokens (M-SMoE).

    Source: https://arxiv.org/abs/2310.01334. Needs no expert to run.
    """

    needs_all_experts: ClassVar[bool] = False

    def __call__(self, sums: ExpertSums) -> Float64[Tensor, "experts experts"]:
        return _one_minus_cosine(sums.logit_gram)


def _over_all_tokens(distance: Distance, total: Tensor | None) -> Tensor:
    if total is None:
        raise ValueError(
            f"{distance} compares outputs over all tokens but the statistics hold routed tokens "
            "only; calibrate with every expert run on every token, or take RouterLogit()"
        )
    return total


def _one_minus_cosine(
    gram: Float64[Tensor, "experts experts"],
) -> Float64[Tensor, "experts experts"]:
    """Turns inner products into distances; a zero vector is at distance 1 from all others."""
    norm = gram.diagonal().sqrt()
    scale = torch.outer(norm, norm)
    return _tidy(1 - torch.where(scale > 0, gram / scale, 0.0))


def _tidy(distance: Float64[Tensor, "experts experts"]) -> Float64[Tensor, "experts experts"]:
    """Removes what rounding did to symmetry, sign and diagonal."""
    return ((distance + distance.mT) / 2).clamp(min=0).fill_diagonal_(0)
