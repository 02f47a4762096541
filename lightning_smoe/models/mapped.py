"""Models whose router rows share experts: their class, and what config.json says of them."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lightning_smoe.errors import InputError
from lightning_smoe.models.expert_count import text_config
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.modeling_smoe import COUNTS_FIELD, TYPE_PREFIX, mapped_model
from lightning_smoe.models.registration import register

_MODULE = "modeling_smoe"


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
    _mapped_class(model)


def become_mapped(model: PreTrainedModel) -> None:
    """Makes a model whose layers share experts one of its family's mapped models, in place.

    Layers whose rows have an expert each get a map that says so. Done twice, it changes nothing.

    Raises:
        InputError: The family, or a model with other router rows in each layer, cannot be one.
    """
    config: Any = model.config
    if not config.model_type.startswith(TYPE_PREFIX):
        made = _mapped_class(model)
        register(config.model_type)
        # In place: every module of the model holds this very configuration.
        model.__class__ = made
        config.__class__ = made.config_class
        # A configuration that was read from a file holds its type itself, too.
        config.model_type = made.config_class.model_type
        config.architectures = [made.__name__]
    layers = find_moe_layers(model)
    for layer in layers:
        if layer.expert_map is None:
            layer.share(layer.weights(), torch.arange(layer.num_router_rows))
    setattr(config, COUNTS_FIELD, {str(layer.index): layer.num_experts for layer in layers})


def _mapped_class(model: PreTrainedModel) -> Any:
    config: Any = model.config
    if text_config(config) is not config or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"router rows of {config.model_type} cannot share experts: its configuration is not "
            "that of a language model alone; choose a router repair that fits rows to groups"
        )
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    made = mapped_model(stock)
    if type(model) is not stock:
        raise InputError(
            "router rows cannot share experts where layers have different numbers of rows; "
            "compress the original"
        )
    return made


def mapped_fields(model: PreTrainedModel, stored: dict[str, Any]) -> dict[str, Any]:
    """A config.json for a mapped model: the original's, but for what says how it is mapped.

    Args:
        model: The model, mapped.
        stored: The original's config.json.
    """
    made = type(model)
    # Other entries name code that does not know of maps; a tokenizer's stays right.
    kept = {k: v for k, v in stored.get("auto_map", {}).items() if k == "AutoTokenizer"}
    auto_map = {
        "AutoConfig": f"{_MODULE}.{type(model.config).__name__}",
        "AutoModelForCausalLM": f"{_MODULE}.{made.__name__}",
    }
    return {
        **stored,
        "architectures": [made.__name__],
        "model_type": model.config.model_type,
        "auto_map": {**kept, **auto_map},
        COUNTS_FIELD: getattr(model.config, COUNTS_FIELD),
    }
