"""Models with other numbers of router rows and experts by layer: class, config.json and code."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from lightning_smoe.errors import InputError
from lightning_smoe.models.expert_count import set_expert_count, text_config
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.modeling_smoe import (
    COUNTS_FIELD,
    PREFIX,
    ROWS_FIELD,
    TYPE_PREFIX,
    mapped_model,
)
from lightning_smoe.models.registration import register

_MODULE = "modeling_smoe"
# What the original's config.json had in the place of what names our classes.
_ORIGINAL = "original_fields"
_REPLACED = ("model_type", "architectures", "auto_map")


def is_mapped(model: PreTrainedModel) -> bool:
    """Says whether router rows of a layer share experts, be it as many as there are rows."""
    return any(layer.expert_map is not None for layer in find_moe_layers(model))


def check_mappable(model: PreTrainedModel) -> None:
    """Checks that router rows of a model can come to share experts, before any work.

    Raises:
        InputError: They cannot, and why.
    """
    if is_mapped(model):
        raise InputError(
            f"router rows of this {model.config.model_type} share experts already; "
            "compress the original"
        )
    check_describable(model)


def check_describable(model: PreTrainedModel) -> None:
    """Checks that a model's configuration can speak of each layer by itself, before any work.

    Raises:
        InputError: It cannot, and why.
    """
    _mapped_class(model)


def become_mapped(model: PreTrainedModel) -> None:
    """Makes a model one of its family's mapped models, in place, and its configuration say so.

    If any layer has a map, those whose rows have an expert each get one that says so. Done twice,
    it changes nothing.

    Raises:
        InputError: The family cannot be one.
    """
    config: Any = model.config
    made = _mapped_class(model)
    if not config.model_type.startswith(TYPE_PREFIX):
        register(config.model_type)
        # In place: every module of the model holds this very configuration.
        model.__class__ = made
        config.__class__ = made.config_class
        # A configuration that was read from a file holds its type itself, too.
        config.model_type = made.config_class.model_type
        config.architectures = [made.__name__]
    counts = None
    layers = find_moe_layers(model)
    if is_mapped(model):
        for layer in layers:
            if layer.expert_map is None:
                layer.share(layer.weights(), torch.arange(layer.num_router_rows))
        counts = {str(layer.index): layer.num_experts for layer in layers}
    rows = {str(layer.index): layer.num_router_rows for layer in layers}
    set_expert_count(model, max(rows.values()))
    setattr(config, COUNTS_FIELD, counts)
    setattr(config, ROWS_FIELD, rows if len(set(rows.values())) > 1 else None)


def _mapped_class(model: PreTrainedModel) -> Any:
    kind: Any = type(model.config)
    if kind.model_type.startswith(TYPE_PREFIX):
        # Each mapped configuration has the family's own as its only base.
        kind = kind.__base__
    if text_config(model.config) is not model.config or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        family = kind.model_type
        raise InputError(
            f"router rows of {family} cannot share experts, nor its layers differ in their number: "
            "its configuration is not that of a language model alone; choose a router repair that "
            "fits rows to groups, all layers, and as many experts in each"
        )
    return mapped_model(MODEL_FOR_CAUSAL_LM_MAPPING[kind])


def mapped_fields(model: PreTrainedModel, stock: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for a mapped model: the original's, but for what says how it is mapped.

    Args:
        model: The model, mapped.
        stock: What config.json would be if all layers had as many router rows as the one with most.
    """
    # Any: transformers declares one key type for the pairs of classes that it also holds.
    config: Any = model.config
    kind: Any = type(config).__base__
    # Other entries name code that does not know of maps; a tokenizer's stays right.
    kept = {k: v for k, v in stock.get("auto_map", {}).items() if k == "AutoTokenizer"}
    classes = {
        "AutoConfig": type(config),
        "AutoModelForCausalLM": type(model),
    }
    if kind in MODEL_MAPPING:
        classes["AutoModel"] = mapped_model(MODEL_MAPPING[kind])
    told = {field: getattr(config, field) for field in (ROWS_FIELD, COUNTS_FIELD)}
    return {
        **stock,
        "architectures": [type(model).__name__],
        "model_type": config.model_type,
        "auto_map": kept | {auto: f"{_MODULE}.{made.__name__}" for auto, made in classes.items()},
        **{field: value for field, value in told.items() if value is not None},
        _ORIGINAL: {field: stock[field] for field in _REPLACED if field in stock},
    }


def stock_fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what says how router rows and experts differ by layer.

    Args:
        stored: A config.json, of a mapped model or another (which stays as it is).
    """
    family = str(stored.get("model_type"))
    if not family.startswith(TYPE_PREFIX):
        return dict(stored)
    names = [str(name).removeprefix(PREFIX) for name in stored.get("architectures", [])]
    # Folders of version 0.1.0 do not say what the original's were.
    assumed = {"model_type": family.removeprefix(TYPE_PREFIX), "architectures": names}
    original = stored.get(_ORIGINAL, assumed)
    left = {COUNTS_FIELD, ROWS_FIELD, _ORIGINAL, *_REPLACED} - original.keys()
    return {k: original.get(k, v) for k, v in stored.items() if k not in left}
