"""Models of transformers in which several router rows share one expert, for every family.

A router keeps all its rows; an index map of each layer sends a row to one of fewer experts, and the
gates of selected rows that share an expert add up. `MappedQwen2MoeConfig` and
`MappedQwen2MoeForCausalLM`, and the like for any family, are made when they are asked for.

This very file also lies beside the weights of such a checkpoint, for `trust_remote_code=True`, so
it imports nothing but torch and transformers.
"""

import re
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

PREFIX = "Mapped"
TYPE_PREFIX = "mapped_"
COUNTS_FIELD = "num_experts_per_layer"
MAP = "expert_map"


def __getattr__(name: str) -> Any:
    """Makes the configuration or model class `Mapped<Stock>` of a class of transformers."""
    # Any: transformers does not say which of its classes can be a key of a cache.
    stock: Any = getattr(transformers, name.removeprefix(PREFIX), None)
    kind = stock if name.startswith(PREFIX) and isinstance(stock, type) else object
    if issubclass(kind, PreTrainedConfig):
        return mapped_config(stock)
    if issubclass(kind, nn.Module):
        return mapped_model(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def mapped_config(stock: Any) -> Any:
    """The configuration class of a family's mapped models.

    Its field `num_experts_per_layer` is the number of experts of every decoder layer that has any:
    a list in their order, or a dictionary by the number of the decoder layer; none leaves one
    expert to each row. The family's own field stays the number of router rows.
    """

    def post_init(config: Any, **kwargs: Any) -> None:
        stock.__post_init__(config, **kwargs)
        _announce(stock)

    body = {
        "__module__": __name__,
        "__annotations__": {COUNTS_FIELD: dict[str, int] | list[int] | None},
        "__post_init__": post_init,
        COUNTS_FIELD: None,
        "model_type": TYPE_PREFIX + stock.model_type,
        # Expert parallelism counts on as many experts as router rows.
        "base_model_ep_plan": None,
        "_auto_class": "AutoConfig",
    }
    return type(PREFIX + stock.__name__, (stock,), body)


@cache
def mapped_model(stock: Any) -> Any:
    """The class of a family's mapped models, whose layers share experts as they are told."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    config_class = mapped_config(stock.config_class)
    # The keys of files are found by type or class name; those of an unknown type are not converted.
    names = {
        stock.config_class.model_type: config_class.model_type,
        stock.__name__: PREFIX + stock.__name__,
    }
    for known, name in names.items():
        conversion = get_checkpoint_conversion_mapping(known)
        if conversion is not None:
            register_checkpoint_conversion_mapping(name, conversion, overwrite=True)

    def init(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(model, config, *args, **kwargs)
        _share_all(model, getattr(config, COUNTS_FIELD))

    def can_set_experts_implementation(_: type) -> bool:
        # transformers looks for a decorator in the text of this file, and would choose `eager`.
        return True

    body = {
        "__module__": __name__,
        "__init__": init,
        "config_class": config_class,
        "_can_set_experts_implementation": classmethod(can_set_experts_implementation),
        "_auto_class": "AutoModelForCausalLM",
    }
    return type(PREFIX + stock.__name__, (stock,), body)


@cache
def _announce(stock: Any) -> None:
    """Tells transformers the model class of a mapped configuration, and which tokenizer it takes.

    Not before one is needed: the module of every family would be imported.
    """
    from transformers.models.auto import modeling_auto, tokenization_auto

    mapped = mapped_config(stock)
    if stock in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        model = mapped_model(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[stock])
        modeling_auto.AutoModelForCausalLM.register(mapped, model, exist_ok=True)
    # Where the tokenizer class on the hub is known to be wrong, transformers goes by the type.
    names, wrong = (
        tokenization_auto.TOKENIZER_MAPPING_NAMES,
        tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    )
    if stock.model_type in names:
        names[mapped.model_type] = names[stock.model_type]
    if stock.model_type in wrong:
        wrong.add(mapped.model_type)


def share_experts(experts: nn.Module, expert_map: Tensor) -> None:
    """Lets router rows share a block's experts, in place.

    Args:
        experts: The module that holds the experts; identity, configuration and hooks stay.
        expert_map: For each router row, the number of its expert.
    """
    if MAP not in dict(experts.named_buffers(recurse=False)):
        stock: Any = type(experts)
        experts.__class__ = _mapped_experts(stock)
    experts.register_buffer(MAP, expert_map)


@cache
def _mapped_experts(stock: Any) -> Any:
    def forward(
        experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Any:
        return stock.forward(experts, hidden_states, experts.expert_map[top_k_index], top_k_weights)

    def reduce(experts: nn.Module) -> tuple[Any, ...]:
        # The class has no name that could be looked up.
        return _blank_experts, (stock,), experts.__dict__

    body = {"__module__": __name__, "forward": forward, "__reduce__": reduce}
    return type(PREFIX + stock.__name__, (stock,), body)


def _blank_experts(stock: Any) -> Any:
    made = _mapped_experts(stock)
    return made.__new__(made)


def _share_all(model: nn.Module, counts: dict[str, int] | list[int] | None) -> None:
    """Cuts every block down to its first experts and gives it a map, as places for what is stored.

    Raises:
        ValueError: The counts do not fit the model's layers.
    """
    found = {_layer_number(n): m for n, m in model.named_modules() if _holds_experts(n, m)}
    rows = {index: int(module.down_proj.shape[0]) for index, module in found.items()}
    if counts is None:
        counts = list(rows.values())
    if isinstance(counts, list):
        counts = {str(index): count for index, count in zip(rows, counts, strict=True)}
    wanted = {int(index): count for index, count in counts.items()}
    fits = wanted.keys() == rows.keys() and all(0 < wanted[i] <= rows[i] for i in rows)
    if not rows or not fits:
        raise ValueError(
            f"{COUNTS_FIELD}={counts} does not fit {type(model).__name__}, whose layers with "
            f"experts have these numbers of router rows: {rows}"
        )
    for index, experts in found.items():
        _cut(experts, wanted[index])
        places = torch.arange(rows[index], device=experts.down_proj.device) % wanted[index]
        share_experts(experts, places)


def _holds_experts(name: str, module: nn.Module) -> bool:
    down_proj = dict(module.named_parameters(recurse=False)).get("down_proj")
    return name.endswith(".experts") and down_proj is not None and down_proj.dim() == 3


def _layer_number(name: str) -> int:
    return int(re.findall(r"\.(\d+)\.", name)[0])


def _cut(experts: Any, count: int) -> None:
    for name, old in list(experts.named_parameters(recurse=False)):
        kept = old.detach()[:count].clone()
        setattr(experts, name, nn.Parameter(kept, requires_grad=old.requires_grad))
    experts.num_experts = count
