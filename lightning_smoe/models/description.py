"""What config.json says of a compressed model."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from lightning_smoe.models.checkpoint import stated_outline
from lightning_smoe.models.expert_count import patch_expert_count
from lightning_smoe.models.folder import CheckpointFolder
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.mapped import (
    become_mapped,
    check_describable,
    is_mapped,
    mapped_fields,
    stock_fields,
)


def described(model: PreTrainedModel, source: CheckpointFolder) -> dict[str, Any]:
    """The configuration of a model: the original's file, patched.

    A model whose layers differ in their number of router rows, or whose rows share experts, becomes
    a mapped model, and its configuration names the code that has to lie beside the weights,
    modeling_smoe.py.

    Args:
        model: The model.
        source: Folder of its original.

    Raises:
        InputError: The family has no configuration that could say it.
    """
    rows = {layer.index: layer.num_router_rows for layer in find_moe_layers(model)}
    config = counted_config(source, rows)
    if not is_mapped(model) and len(set(rows.values())) == 1:
        return config
    become_mapped(model)
    return mapped_fields(model, config)


def counted_config(source: CheckpointFolder, rows: Mapping[int, int]) -> dict[str, Any]:
    """The family's own configuration for as many router rows as the layer with most has.

    Args:
        source: Folder of the original.
        rows: Router rows of each decoder layer that has experts.

    Raises:
        InputError: The family has no configuration that could say it, even beside other fields.
    """
    stated = stated_outline(source)
    if len(set(rows.values())) > 1:
        check_describable(stated)
    old = max(layer.num_router_rows for layer in find_moe_layers(stated))
    new, config = max(rows.values()), stock_fields(source.config)
    return config if old == new else patch_expert_count(config, old, new)
