"""How far tensors of one kind are from those that they were made from."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers that are compared in float64 in one go.
_BLOCK = 1 << 22


@dataclass
class Difference:
    """How the tensors of one role differ.

    Attributes:
        equal: Tensors that are equal bit for bit.
        changed: Tensors of the original's shape with other numbers.
        other: Tensors of another shape, or that the original lacks.
        largest: Largest absolute difference of the changed ones.
    """

    equal: int = 0
    changed: int = 0
    other: int = 0
    largest: float = 0.0
    _apart: float = 0.0
    _size: float = 0.0

    @property
    def relative(self) -> float:
        """Frobenius norm of the difference of changed tensors, by that of the original's."""
        if not self._size:
            return math.inf if self._apart else 0.0
        return math.sqrt(self._apart / self._size)

    def add(self, found: Tensor, wanted: Tensor | None) -> bool:
        """Counts one tensor; says whether it is equal to the original's."""
        if wanted is None or found.shape != wanted.shape:
            self.other += 1
            return False
        if found.dtype == wanted.dtype and same_bits(found, wanted):
            self.equal += 1
            return True
        self.changed += 1
        for piece, old in zip(*(t.flatten().split(_BLOCK) for t in (found, wanted)), strict=True):
            before, apart = old.double(), piece.double() - old.double()
            self._apart += float(apart.square().sum())
            self._size += float(before.square().sum())
            self.largest = max(self.largest, float(apart.abs().max()) if len(apart) else 0.0)
        return False


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bytes, so that NaN is equal to itself."""
    return a.dtype == b.dtype and torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, in the order of its elements."""
    return tensor.contiguous().flatten().view(torch.uint8)
