"""How much a layer would miss each expert, from its sums; pruning drops the lowest."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from lightning_smoe.functional.sums import ExpertSums


class Saliency(ABC):
    """Importance of each expert of one layer."""

    @abstractmethod
    def __call__(self, sums: ExpertSums) -> Float64[Tensor, " experts"]:
        """Scores every expert.

        Args:
            sums: Sums of one layer without a domain axis.

        Returns:
            Importance, higher is kept; zero for an expert that no token visits.
        """


@dataclass(frozen=True)
class Frequency(Saliency):
    """Fraction of the tokens that are routed to the expert."""

    def __call__(self, sums: ExpertSums) -> Float64[Tensor, " experts"]:
        return sums.count.double() / sums.num_tokens


@dataclass(frozen=True)
class GateMass(Saliency):
    """Sum of the expert's routing weights, sum_x g(x)."""

    def __call__(self, sums: ExpertSums) -> Float64[Tensor, " experts"]:
        return sums.gate_sum


@dataclass(frozen=True)
class Reap(Saliency):
    """Mean router-weighted output norm over the tokens routed to the expert.

    `(1 / count) sum_x g(x) ||f(x)||` (REAP, https://arxiv.org/abs/2510.13999). A mean, so it does
    not see how often the expert is used.
    """

    def __call__(self, sums: ExpertSums) -> Float64[Tensor, " experts"]:
        return sums.gated_norm_sum / sums.count.clamp(min=1)


@dataclass(frozen=True)
class ReapSum(Saliency):
    """Sum of the router-weighted output norms, `sum_x g(x) ||f(x)||`.

    REAP (https://arxiv.org/abs/2510.13999) times the number of tokens: it also sees how often the
    expert is used, and disagrees with REAP where usage is skewed.
    """

    def __call__(self, sums: ExpertSums) -> Float64[Tensor, " experts"]:
        return sums.gated_norm_sum
