"""Importance of experts from their weights alone, without any calibration text."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.saliency import Saliency


@dataclass(frozen=True)
class Aimer(Saliency):
    """One minus the ratio of mean absolute weight to root mean square weight (AIMER).

    `1 - (||w||_1 / N) / (||w||_2 / sqrt(N))`, w the N numbers of an expert's gate, up and down
    matrices together (https://arxiv.org/abs/2603.18492, Eq. 4-5, which prunes the highest ratio).
    Zero where all numbers have one size, near 0.2 for normally distributed ones, near one where a
    few hold all the energy. It knows neither router nor text; biases do not count.
    """

    def __call__(self, evidence: Evidence) -> Float64[Tensor, " experts"]:
        weights = evidence.weights
        matrices = [weights.up_proj, weights.down_proj]
        if weights.gate_proj is not None:
            matrices.append(weights.gate_proj)
        count = sum(matrix[0].numel() for matrix in matrices)
        absolute = _summed(matrices, 1)
        energy = _summed(matrices, 2)
        # An expert of zeros is the most replaceable of all: the highest ratio.
        ratio = torch.where(energy > 0, absolute / (count * energy).sqrt(), 1.0)
        return (1 - ratio).clamp(min=0)


def _summed(matrices: list[Tensor], power: int) -> Float64[Tensor, " experts"]:
    """Sum of the absolute weights of each expert to that power, without a float64 copy of them."""
    norms = [
        torch.linalg.vector_norm(matrix.detach(), power, dim=(1, 2), dtype=torch.float64) ** power
        for matrix in matrices
    ]
    return torch.stack(norms).sum(0)
