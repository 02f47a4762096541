"""Importance of experts by what they add to those already kept."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.refit import check_strength
from lightning_smoe.functional.saliency import Saliency


@dataclass(frozen=True)
class Coverage(Saliency):
    """Gain of each expert when the layer is rebuilt greedily by a D-optimal design.

    Experts enter one by one, each time the one that raises `log det(I + K_S / lam)` most, with
    `K_ij = sum_x g_i g_j f_i(x) . f_j(x)` over the sampled tokens; the importance is that rise, in
    nats. The determinant is submodular, so rises fall from one expert to the next and importance
    sorts experts by when they entered. An expert counts for what the experts before it cannot
    reproduce: of two that always say the same together, the second is worth little. Such a score is
    reported to be the best of many for turning experts into a dense layer
    (https://arxiv.org/abs/2605.28207). With lam far above the energies it sorts as `ReapEnergy`.

    Args:
        strength: lam relative to the mean of K's diagonal, at least 1e-6.
    """

    strength: float = 0.1

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def __call__(self, evidence: Evidence) -> Float64[Tensor, " experts"]:
        gram = evidence.pairs.gated_gram
        scale = self.strength * gram.diagonal().mean()
        if scale == 0:
            return torch.zeros_like(gram[0])
        return greedy_gains(gram / scale)


def greedy_gains(gram: Float64[Tensor, "experts experts"]) -> Float64[Tensor, " experts"]:
    """Rise of log det(I + gram) with each expert, when the best enters first.

    Each step is one row of an incremental Cholesky factorisation, so all of them together cost
    as much as one determinant (https://arxiv.org/abs/1709.05135).

    Args:
        gram: Symmetric, without negative eigenvalues.

    Returns:
        Rise at the expert's own turn, in nats.
    """
    number = len(gram)
    residual = 1 + gram.diagonal()
    rows = gram.new_zeros(number, number)
    gains = gram.new_zeros(number)
    waiting = torch.ones(number, dtype=torch.bool, device=gram.device)
    for turn in range(number):
        best = int(residual.masked_fill(~waiting, -1).argmax())
        waiting[best] = False
        gains[best] = residual[best].log()
        # With the one on its diagonal, no residual of I + gram falls below one but for rounding.
        row = (gram[best] - rows[:turn].T @ rows[:turn, best]) / residual[best].sqrt()
        rows[turn] = row
        residual = (residual - row.square()).clamp(min=1)
    return gains
