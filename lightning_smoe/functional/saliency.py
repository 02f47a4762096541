"""How much a layer would miss each expert; pruning drops the lowest."""

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from lightning_smoe.functional.evidence import Evidence


class Saliency(ABC):
    """Importance of each expert of one layer."""

    @abstractmethod
    def __call__(self, evidence: Evidence) -> Float64[Tensor, " experts"]:
        """Scores every expert.

        Args:
            evidence: All that is known of the layer.

        Returns:
            Importance, at least zero, higher is kept. Scores that follow from sums over routed
            tokens are zero for an expert that no token visits.
        """


@dataclass(frozen=True)
class Random(Saliency):
    """Uniform random numbers: what any other criterion has to beat.

    They depend on the seed and on the layer's weights alone: layers differ, and other calibration
    text gives the same numbers. Report the spread over several seeds.

    Args:
        seed: Seed of the numbers.
    """

    seed: int = 0

    def __call__(self, evidence: Evidence) -> Float64[Tensor, " experts"]:
        # One row of every expert tells layers apart; float64 holds every other type exactly.
        rows = evidence.weights.up_proj[:, 0].detach().double().cpu()
        layer = zlib.crc32(rows.numpy().tobytes(), zlib.crc32(str(self.seed).encode()))
        generator = torch.Generator().manual_seed(layer)
        drawn = torch.rand(evidence.num_experts, generator=generator, dtype=torch.float64)
        return drawn.to(evidence.sums.count.device)


@dataclass(frozen=True)
class Frequency(Saliency):
    """Fraction of the tokens that are routed to the expert."""

    def __call__(self, evidence: Evidence) -> Float64[Tensor, " experts"]:
        return evidence.sums.count.double() / evidence.sums.num_tokens


@dataclass(frozen=True)
class GateMass(Saliency):
    """Sum of the expert's routing weights, sum_x g(x)."""

    def __call__(self, evidence: Evidence) -> Float64[Tensor, " experts"]:
        return evidence.sums.gate_sum


@dataclass(frozen=True)
class OutputNormSum(Saliency):
    """Sum of the output norms over the tokens routed to the expert, `sum_x ||f(x)||`.

    Expert activation norm (EAN, https://arxiv.org/abs/2504.05586). Blind to routing weights.
    """

    def __call__(self, evidence: Evidence) -> Float64[Tensor, " experts"]:
        return evidence.sums.output_norm_sum


@dataclass(frozen=True)
class OutputNormMean(Saliency):
    """Mean output norm over the tokens routed to the expert, `(1 / count) sum_x ||f(x)||`.

    `OutputNormSum` without how often the expert is used.
    """

    def __call__(self, evidence: Evidence) -> Float64[Tensor, " experts"]:
        return evidence.sums.output_norm_sum / evidence.sums.count.clamp(min=1)


@dataclass(frozen=True)
class Reap(Saliency):
    """Mean router-weighted output norm over the tokens routed to the expert.

    `(1 / count) sum_x g(x) ||f(x)||` (REAP, https://arxiv.org/abs/2510.13999). A mean, so it does
    not see how often the expert is used.
    """

    def __call__(self, evidence: Evidence) -> Float64[Tensor, " experts"]:
        sums = evidence.sums
        return sums.gated_norm_sum / sums.count.clamp(min=1)


@dataclass(frozen=True)
class ReapSum(Saliency):
    """Sum of the router-weighted output norms, `sum_x g(x) ||f(x)||`.

    REAP (https://arxiv.org/abs/2510.13999) times the number of tokens: it also sees how often the
    expert is used, and disagrees with REAP where usage is skewed.
    """

    def __call__(self, evidence: Evidence) -> Float64[Tensor, " experts"]:
        return evidence.sums.gated_norm_sum


@dataclass(frozen=True)
class ReapEnergy(Saliency):
    """Root of the energy that goes missing with the expert, `sqrt(sum_x g(x)^2 ||f(x)||^2)`.

    The exact change of the layer's output in the L2 norm if the expert's term is left out and no
    other expert is promoted in its place.
    """

    def __call__(self, evidence: Evidence) -> Float64[Tensor, " experts"]:
        return evidence.sums.gated_energy_sum.sqrt()


@dataclass(frozen=True)
class OutputVariance(Saliency):
    """Usage times variance of the output, `count * Var_x[f(x)]`, summed over hidden dimensions.

    That is `sum_x ||f(x) - mean f||^2`: the energy that is lost when the expert's own mean output
    takes its place. MoNE (https://arxiv.org/abs/2507.00390) keeps that mean, a constant "novice",
    and the expert's router row; here the row goes with the expert and the novice is not kept, so
    an expert whose large output never changes is scored too low: `ReapSum` has no such fault.
    """

    def __call__(self, evidence: Evidence) -> Float64[Tensor, " experts"]:
        return _spread(evidence)


@dataclass(frozen=True)
class MoNE(Saliency):
    """Mean routing weight times standard deviation of the output.

    `(sum_x g(x) / count) * sqrt(sum_x ||f(x) - mean f||^2 / (count - 1))` over the tokens routed to
    the expert (MoNE, https://arxiv.org/abs/2507.00390). Both factors are means: it does not see how
    often the expert is used. The novice is not kept, as with `OutputVariance`. Zero for an expert
    that fewer than two tokens visit.
    """

    def __call__(self, evidence: Evidence) -> Float64[Tensor, " experts"]:
        count = evidence.sums.count
        deviation = (_spread(evidence) / (count - 1).clamp(min=1)).sqrt()
        return evidence.sums.gate_sum / count.clamp(min=1) * deviation


def _spread(evidence: Evidence) -> Float64[Tensor, " experts"]:
    """Sum of squared distances of an expert's outputs from their mean, over its routed tokens."""
    sums = evidence.sums
    mean_energy = sums.output_sum.square().sum(1) / sums.count.clamp(min=1)
    return (sums.output_energy_sum - mean_energy).clamp(min=0)
