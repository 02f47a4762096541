"""Which parts of a model training may change."""

from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import MoELayer, find_moe_layers

Part = Literal["router", "experts", "shared", "all"]


def find_parts(
    layers: Sequence[MoELayer], parts: Sequence[Part]
) -> dict[Part, list[torch.nn.Parameter]]:
    """Parameters of each named part of a model's layers; `all` is no part of a layer.

    Raises:
        InputError: The model has no such part.
    """
    found: dict[Part, list[torch.nn.Parameter]] = {
        part: [p for layer in layers for p in layer.parameters_of(part)]
        for part in parts
        if part != "all"
    }
    for part, parameters in found.items():
        if not parameters:
            raise InputError(
                f"model.recovery.trainable names {part}, which the model does not have"
            )
    return found


def select_trainable(model: PreTrainedModel, parts: Sequence[Part]) -> dict[str, int]:
    """Lets only the named parts of a model change, and holds them in float32.

    In bfloat16 most of Adam's steps would be rounded away; the other parts keep their type.

    Returns:
        Number of trainable parameters of each part.

    Raises:
        InputError: The model has no such part.
    """
    layers = find_moe_layers(model)
    chosen = find_parts(layers, parts)
    if "all" in parts:
        fixed = {id(p) for layer in layers for p in layer.selection_tensors()}
        chosen["all"] = [p for p in model.parameters() if id(p) not in fixed]
    model.requires_grad_(False)
    for parameters in chosen.values():
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return {part: sum(p.numel() for p in parameters) for part, parameters in chosen.items()}
