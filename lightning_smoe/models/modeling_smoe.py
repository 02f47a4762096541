"""Models of transformers with other numbers of router rows and experts by layer, for every family.

Layers may have different numbers of router rows, each with its expert. Or several rows share one:
an index map of each layer sends a row to one of fewer experts, and the gates of selected rows that
share an expert add up. Both go together. `MappedQwen2MoeConfig`, `MappedQwen2MoeForCausalLM` and
`MappedQwen2MoeModel`, and the like for any family, are made when they are asked for.

This very file also lies beside the weights of such a checkpoint, for `trust_remote_code=True`, so
it imports nothing but torch and transformers.
"""

import re
import sys
from functools import cache, wraps
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig

PREFIX = "Mapped"
TYPE_PREFIX = "mapped_"
COUNTS_FIELD = "num_experts_per_layer"
ROWS_FIELD = "num_router_rows_per_layer"
MAP = "expert_map"
_ROUTERS = ("gate", "router")
# What vLLM calls attention when it builds a model of transformers to take it apart.
_VLLM = ("vllm", "vllm_mla")
_COUNT_ATTRIBUTES = ("num_experts", "num_local_experts", "n_routed_experts", "out_features")


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

    Two fields speak of every decoder layer that has experts: by a list in their order, or by a
    dictionary from the number of the decoder layer. `num_router_rows_per_layer` are the rows of the
    routers; none: as many as the family's own field says, which else is the largest of them.
    `num_experts_per_layer` are the experts that rows share by a map; none: an expert to each row,
    and no map.
    """

    def post_init(config: Any, **kwargs: Any) -> None:
        stock.__post_init__(config, **kwargs)
        _announce(stock)

    fields = (COUNTS_FIELD, ROWS_FIELD)
    body = {
        "__module__": __name__,
        "__annotations__": dict.fromkeys(fields, dict[str, int] | list[int] | None),
        "__post_init__": post_init,
        **dict.fromkeys(fields),
        "model_type": TYPE_PREFIX + stock.model_type,
        # Expert parallelism counts on as many experts as router rows.
        "base_model_ep_plan": None,
        "_auto_class": "AutoConfig",
    }
    return type(PREFIX + stock.__name__, (stock,), body)


@cache
def mapped_model(stock: Any) -> Any:
    """The class of a family's mapped models, with a head or without, built as they are told."""
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

    # vLLM 0.32 holds the first argument against the annotation of the model itself.
    def init(model: object, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(model, config, *args, **kwargs)
        _fit_all(model, config)

    def can_set_experts_implementation(_: type) -> bool:
        # transformers looks for a decorator in the text of this file, and would choose `eager`.
        return True

    has_head = issubclass(stock, GenerationMixin)
    body = {
        "__module__": __name__,
        "__init__": init,
        "config_class": config_class,
        "_can_set_experts_implementation": classmethod(can_set_experts_implementation),
        "_auto_class": "AutoModelForCausalLM" if has_head else "AutoModel",
    }
    if has_head and hasattr(sys.modules[stock.__module__], "load_balancing_loss_func"):
        body["forward"] = _refusing_uneven_loss(stock)
    return type(PREFIX + stock.__name__, (stock,), body)


def _refusing_uneven_loss(stock: Any) -> Any:
    """The family's forward pass, that says so where its load-balancing loss is not defined."""

    @wraps(stock.forward)
    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("output_router_logits")
        asked = getattr(model.config, "output_router_logits", False) if asked is None else asked
        rows = getattr(model.config, ROWS_FIELD, None) or {}
        if asked and len(set(rows.values() if isinstance(rows, dict) else rows)) > 1:
            raise ValueError(
                f"output_router_logits=True asks {type(model).__name__} for its load-balancing "
                "loss, which is only defined for layers with equal numbers of router rows, and "
                f"these are {rows}; set output_router_logits=False, or call its base model for the "
                "logits of its routers"
            )
        return stock.forward(model, *args, **kwargs)

    return forward


@cache
def _announce(stock: Any) -> None:
    """Tells transformers the model classes of a mapped configuration, and which tokenizer it takes.

    Not before one is needed: the module of every family would be imported.
    """
    from transformers.models.auto import modeling_auto, tokenization_auto

    mapped = mapped_config(stock)
    for auto, known in (
        (modeling_auto.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING),
        (modeling_auto.AutoModel, modeling_auto.MODEL_MAPPING),
    ):
        if stock in known:
            auto.register(mapped, mapped_model(known[stock]), exist_ok=True)
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


def _fit_all(model: Any, config: Any) -> None:
    """Cuts every block down to its rows and experts, with or without a map: places to be filled.

    Raises:
        ValueError: The numbers do not fit the model's layers.
    """
    found = [n for n, m in model.named_modules() if _holds_experts(n, m)]
    blocks: dict[int, Any] = {
        _layer_number(name): model.get_submodule(name.rpartition(".")[0]) for name in found
    }
    built = {index: int(block.experts.down_proj.shape[0]) for index, block in blocks.items()}
    if getattr(config, COUNTS_FIELD) is not None and str(config._attn_implementation) in _VLLM:
        raise ValueError(
            "vLLM's own experts would take the place of those that router rows share, and lose the "
            "map; install lightning-smoe beside vLLM, whose plugin serves it for some families, or "
            "export the checkpoint to its stock form"
        )
    rows = _told(model, config, ROWS_FIELD, built)
    counts = _told(model, config, COUNTS_FIELD, rows)
    for index, block in blocks.items():
        _cut_rows(block, built[index], rows[index])
        if getattr(config, COUNTS_FIELD) is not None:
            _cut(block.experts, counts[index])
            places = torch.arange(rows[index], device=block.experts.down_proj.device)
            share_experts(block.experts, places % counts[index])


def _told(model: nn.Module, config: Any, field: str, limits: dict[int, int]) -> dict[int, int]:
    """A number for each layer that has experts, as a field says it; without it, the limits."""
    told = getattr(config, field)
    if told is None and limits:
        return limits
    named = told if isinstance(told, dict) else dict(zip(limits, told or (), strict=False))
    wanted = {int(index): count for index, count in named.items()}
    fits = len(told or ()) == len(limits) and wanted.keys() == limits.keys()
    if not limits or not fits or not all(0 < wanted[i] <= limits[i] for i in limits):
        raise ValueError(
            f"{field}={told} does not fit {type(model).__name__}, whose layers with experts have "
            f"these numbers of router rows: {limits}"
        )
    return wanted


def _holds_experts(name: str, module: nn.Module) -> bool:
    down_proj = dict(module.named_parameters(recurse=False)).get("down_proj")
    return name.endswith(".experts") and down_proj is not None and down_proj.dim() == 3


def _layer_number(name: str) -> int:
    return int(re.findall(r"\.(\d+)\.", name)[0])


def _cut_rows(block: Any, old: int, new: int) -> None:
    """Keeps the first rows of whatever a block has for each of its experts."""
    if new == old:
        return
    _cut(block.experts, new)
    children = dict(block.named_children())
    routers = [children[name] for name in _ROUTERS if name in children]
    for module in (block, *(m for router in routers for m in router.modules())):
        _recount(module, old, new)
        # Routers that also score shared experts do so by their last rows (Inkling).
        shared = int(getattr(module, "n_shared_experts", None) or 0)
        named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in named:
            is_selection = name.endswith("bias") or name == "per_expert_scale"
            if tensor.dim() > 1 and len(tensor) == old + shared:
                _put(module, name, torch.cat([tensor[:new], tensor[old:]]))
            elif is_selection and tensor.shape[-1:] == (old,):
                _put(module, name, tensor[..., :new])


def _cut(experts: Any, count: int) -> None:
    old = int(experts.down_proj.shape[0])
    for name, tensor in list(experts.named_parameters(recurse=False)):
        _put(experts, name, tensor[:count])
    _recount(experts, old, count)


def _put(module: nn.Module, name: str, rows: Tensor) -> None:
    old: Any = getattr(module, name)
    # A copy: a view would keep all rows in memory.
    kept: Tensor = rows.detach().clone()
    is_parameter = isinstance(old, nn.Parameter)
    setattr(module, name, nn.Parameter(kept, old.requires_grad) if is_parameter else kept)


def _recount(module: Any, old: int, new: int) -> None:
    for attribute in _COUNT_ATTRIBUTES:
        if module.__dict__.get(attribute) == old:
            module.__dict__[attribute] = new
