"""Tensors of a model while they are not used: as they are, or in 8 bits."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

_LARGEST = 127  # of a signed byte, the same on both sides of zero


class RestingTensor(ABC):
    """A tensor of a decoder layer while the layer does not run."""

    @abstractmethod
    def fetch(self, device: torch.device) -> Tensor:
        """The tensor as the layer multiplies with it."""

    @abstractmethod
    def moved(self, device: torch.device) -> "RestingTensor":
        """The same tensor, resting elsewhere."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory that it takes at rest."""


@dataclass(frozen=True, eq=False)
class WholeTensor(RestingTensor):
    """A tensor that rests as it is.

    Args:
        values: The tensor.
    """

    values: Tensor

    def fetch(self, device: torch.device) -> Tensor:
        """The tensor itself, copied only where it rests on another device."""
        return self.values.to(device, non_blocking=True)

    def moved(self, device: torch.device) -> "WholeTensor":
        """The tensor on another device."""
        return WholeTensor(self.values.to(device))

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.values.numel() * self.values.element_size()


@dataclass(frozen=True, eq=False)
class RoundedTensor(RestingTensor):
    """A matrix, or one for each expert, in signed bytes with one scale an output channel.

    Args:
        values: Whole numbers from -127 to 127.
        scale: What they are multiplied by; one long where `values` has an axis of inputs.
        dtype: Type of the matrix before.
    """

    values: Int8[Tensor, "..."]
    scale: Float[Tensor, "..."]
    dtype: torch.dtype

    @staticmethod
    def of(matrix: Float[Tensor, "..."], axes: tuple[int, ...]) -> "RoundedTensor":
        """Rounds a matrix to the nearest multiples of its largest entries over 127.

        Args:
            matrix: The matrix.
            axes: Its axes of inputs.
        """
        largest = matrix.float().abs().amax(axes, keepdim=True)
        # A channel of zeros has no scale of its own; any gives zeros again.
        scale = torch.where(largest > 0, largest, 1.0) / _LARGEST
        values = (matrix.float() / scale).round_().to(torch.int8)
        return RoundedTensor(values, scale, matrix.dtype)

    def fetch(self, device: torch.device) -> Tensor:
        """The matrix, rounded; bytes go to the device, not numbers."""
        values = self.values.to(device, non_blocking=True)
        scale = self.scale.to(device, non_blocking=True)
        return (values.float() * scale).to(self.dtype)

    def moved(self, device: torch.device) -> "RoundedTensor":
        """The bytes and scales on another device."""
        return RoundedTensor(self.values.to(device), self.scale.to(device), self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the numbers and of the scales."""
        return self.values.numel() + self.scale.numel() * self.scale.element_size()
