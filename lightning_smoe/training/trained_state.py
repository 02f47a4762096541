"""What training changes of a model, apart from all the rest."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def keep_trained(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Leaves out of a state what training does not change; the hook of a state_dict."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    for name in [name for name in state if name not in trained]:
        del state[name]


@torch.no_grad()
def trained_state(student: nn.Module) -> dict[str, Tensor]:
    """Copies of what is trained, by their names in the student, in main memory."""
    named = student.named_parameters()
    return {name: p.detach().to("cpu", copy=True) for name, p in named if p.requires_grad}


@torch.no_grad()
def load_trained(student: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts trained tensors into a student, in place; weights keep their types.

    Args:
        student: The student.
        state: Tensors by their names in it.
    """
    parameters = dict(student.named_parameters())
    for name, tensor in state.items():
        parameters[name].copy_(tensor)
