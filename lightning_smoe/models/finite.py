"""Whether weights are numbers."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from lightning_smoe.errors import InputError


@torch.no_grad()
def refuse_not_finite(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Checks weights that are in memory, at the cost of reading them once.

    Args:
        folder: Where they came from.
        tensors: The weights by name; those on the meta device are passed over.

    Raises:
        InputError: One holds NaN or an infinite number.
    """
    for name, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        # A sum needs no second tensor; only where it overflows are the numbers looked at singly.
        if not math.isfinite(tensor.sum().item()) and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{folder}: {name} holds NaN or infinite numbers; copy the checkpoint again "
                f"(python -m lightning_smoe verify {folder} names every such tensor)"
            )
