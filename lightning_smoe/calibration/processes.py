"""Sums and maxima over the processes that share a text."""

from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_smoe.models.progress import Reduce


def over_processes(strategy: Strategy) -> Reduce:
    """Sum or maximum of a tensor over processes, as its second argument says."""

    def reduce(tensor: Tensor, how: str) -> Tensor:
        # Any: Lightning leaves the result of a reduction open.
        reduced: Any = strategy.reduce(tensor.to(strategy.root_device), reduce_op=how)
        return torch.as_tensor(reduced)

    return reduce
