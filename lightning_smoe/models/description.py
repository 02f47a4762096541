"""What config.json and smoe.json say of a compressed model."""

from typing import Any

from transformers import PreTrainedModel

from lightning_smoe.models.checkpoint import stated_outline
from lightning_smoe.models.expert_count import patch_expert_count
from lightning_smoe.models.folder import CheckpointFolder
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.mapped import become_mapped, is_mapped, mapped_fields


def described(
    model: PreTrainedModel, source: CheckpointFolder
) -> tuple[dict[str, Any], dict[str, int]]:
    """The configuration of a model, and the layers whose count it cannot say."""
    if is_mapped(model):
        become_mapped(model)
        return mapped_fields(model, source.config), {}
    return counted_config(source, {x.index: x.num_experts for x in find_moe_layers(model)})


def counted_config(
    source: CheckpointFolder, counts: dict[int, int]
) -> tuple[dict[str, Any], dict[str, int]]:
    """The configuration for these counts, and the layers whose count it cannot say."""
    # What config.json says, also where the layers of the source differ from it.
    stated = {layer.num_experts for layer in find_moe_layers(stated_outline(source))}
    if len(set(counts.values())) == 1 == len(stated):
        old, new = stated.pop(), next(iter(counts.values()))
        config = source.config if old == new else patch_expert_count(source.config, old, new)
        return config, {}
    return source.config, {str(index): count for index, count in counts.items()}
