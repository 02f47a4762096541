"""Models whose router rows share experts, taken apart again."""

from typing import Any

import torch
from transformers import PreTrainedModel

from lightning_smoe.models.folder import CheckpointFolder
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.modeling_smoe import COUNTS_FIELD, MAP, ROWS_FIELD
from lightning_smoe.models.tensor_reader import TensorReader


@torch.no_grad()
def give_each_row_its_own(model: PreTrainedModel) -> None:
    """Makes a mapped model that was loaded one of its family, with a copy for each row, in place.

    It stays the same function. Layers have the original's number of experts, and its size.
    """
    for layer in find_moe_layers(model):
        if layer.expert_map is None:
            continue
        experts, rows = layer.experts, layer.num_router_rows
        layer.store(layer.weights().select(layer.expert_map))
        delattr(experts, MAP)
        experts.__class__ = type(experts).__bases__[0]
        experts.num_experts = rows
    config: Any = model.config
    # Each class of a mapped model has the family's own as its only base.
    model.__class__ = type(model).__bases__[0]
    config.__class__ = type(config).__bases__[0]
    config.model_type = type(config).model_type
    config.architectures = [type(model).__name__]
    for field in {COUNTS_FIELD, ROWS_FIELD} & vars(config).keys():
        delattr(config, field)


def stored_maps(folder: CheckpointFolder) -> dict[int, list[int]]:
    """The expert of each router row, by the number of the decoder layer, read from the files."""
    found = {}
    with TensorReader(folder) as stored:
        for key in stored.places:
            path, _, name = key.rpartition(".")
            if name == MAP:
                number = next(int(part) for part in path.split(".") if part.isdigit())
                found[number] = [int(expert) for expert in stored.read(key)]
    return found
