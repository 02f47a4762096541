"""Products of features and targets, summed over tokens: all that a least-squares fit needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over tokens for fits of targets by features.

    Args:
        gram: Features times features.
        cross: Targets times features.
        energy: Sum of the squared targets, one number.
    """

    gram: Float64[Tensor, "features features"]
    cross: Float64[Tensor, "outputs features"]
    energy: Float64[Tensor, ""]

    @staticmethod
    def zeros(num_features: int, num_outputs: int, device: torch.device) -> "Moments":
        """Sums over no tokens."""
        gram = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        cross = torch.zeros(num_outputs, num_features, dtype=torch.float64, device=device)
        return Moments(gram, cross, torch.zeros((), dtype=torch.float64, device=device))

    def add(
        self,
        features: Float[Tensor, "tokens features"],
        targets: Float[Tensor, "tokens outputs"],
        blocks: Sequence[tuple[slice, Tensor | slice]] = ((slice(None), slice(None)),),
    ) -> None:
        """Adds tokens, in place; products in float32, sums in float64.

        Args:
            features: What the weights multiply.
            targets: What the products should be.
            blocks: Where features can differ from zero: columns, and the tokens for which they do.
                With top_k of num_experts experts active this saves most of the work.
        """
        features, targets = features.float(), targets.float()
        for columns, rows in blocks:
            active = features[rows, columns]
            self.gram[columns].add_(active.T @ features[rows])
            self.cross[:, columns].add_(targets[rows].T @ active)
        self.energy.add_(targets.double().square().sum())

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> "Moments":
        """Adds up the sums of all processes.

        Args:
            reduce: Sum of a tensor over processes.
        """
        return Moments(reduce(self.gram), reduce(self.cross), reduce(self.energy))

    def plus(self, other: "Moments") -> "Moments":
        """Adds the sums over other tokens."""
        return Moments(self.gram + other.gram, self.cross + other.cross, self.energy + other.energy)

    def error(self, weights: Float[Tensor, "outputs features"]) -> Float64[Tensor, ""]:
        """Squared error of `targets = weights @ features`, relative to the targets' energy."""
        wide = weights.double()
        explained = 2 * (self.cross * wide).sum() - ((wide @ self.gram) * wide).sum()
        return (self.energy - explained) / self.energy
