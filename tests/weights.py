"""What tests look at in the weights of experts."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lightning_smoe.functional.experts import ExpertWeights


def parts(weights: "ExpertWeights") -> list[Tensor]:
    """The tensors that are there."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    weights.map(note)
    return found
