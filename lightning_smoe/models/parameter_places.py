"""The places of a model's parameters, with their numbers or without."""

from collections.abc import Iterable

import torch
from torch import nn


def place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and its name there."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def move(module: nn.Module, device: torch.device) -> None:
    """Moves what a module itself holds, but for parameters that are away."""
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.is_meta and parameter.device != device:
            module._parameters[name] = nn.Parameter(parameter.to(device), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(device)


def free(modules: Iterable[nn.Module]) -> None:
    """Leaves the shapes of parameters, without their numbers."""
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                outline = torch.empty_like(parameter, device="meta")
                module._parameters[name] = nn.Parameter(outline, requires_grad=False)
