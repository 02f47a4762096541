"""The number of routed experts, as configurations and models of transformers hold it."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_smoe.errors import InputError

COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_COUNT_ATTRIBUTES = ("num_experts", "num_local_experts", "n_routed_experts", "out_features")
# Gemma 4 holds the number of selected experts in the configuration alone.
TOP_K_FIELDS = ("num_experts_per_tok", "top_k_experts")


def text_config(config: Any) -> Any:
    """The language model's part of a configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def claims_experts(config: Any) -> bool:
    """Says whether a configuration names a number of routed experts."""
    return any(getattr(config, field, None) for field in COUNT_FIELDS)


def recount(modules: Iterable[nn.Module], old: int, new: int) -> None:
    """Tells modules the new number of experts where an attribute of theirs holds the old one."""
    for module in modules:
        for attribute in _COUNT_ATTRIBUTES:
            if module.__dict__.get(attribute) == old:
                module.__dict__[attribute] = new


def set_expert_count(model: nn.Module, count: int) -> None:
    """Tells a model in memory, and its configuration, how many routed experts a layer has."""
    config = text_config(model.config)
    for field in COUNT_FIELDS:
        if field in config.__dict__:
            setattr(config, field, count)
    for module in (model, getattr(model, "model", None)):
        if module is not None and isinstance(module.__dict__.get("num_experts"), int):
            module.__dict__["num_experts"] = count


def patch_expert_count(config: dict[str, Any], old: int, new: int) -> dict[str, Any]:
    """Copies a config.json, changing nothing but the number of routed experts.

    Raises:
        InputError: No field of the file holds the old number.
    """
    patched = {
        k: patch_expert_count(v, old, new) if k == "text_config" else v for k, v in config.items()
    }
    fields = [f for f in COUNT_FIELDS if config.get(f) == old]
    if not fields and patched == config:
        raise InputError(
            f"config.json names {old} experts in none of {', '.join(COUNT_FIELDS)}; add the field"
        )
    return {**patched, **dict.fromkeys(fields, new)}
