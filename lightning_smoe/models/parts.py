"""Which parameters of a model are its routers, experts, shared experts, norms and attention."""

import inspect
import re
from typing import Final, Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.walk import decoder_layers

Part = Literal["router", "norm", "shared", "down_proj", "experts", "attention", "all"]
PARTS: Final[tuple[Part, ...]] = get_args(Part)
# What a module that mixes positions is handed beside hidden states, in every family.
_MIXING_ARGUMENT = re.compile("mask|cache|past_key")


def parameters_of_parts(model: PreTrainedModel) -> dict[Part, dict[str, nn.Parameter]]:
    """Parameters of every part by their full names, in the model's order; reads no weight.

    `router`, `norm` (normalisations within decoder layers), `shared` (shared expert and its gate),
    `experts` and `attention` (what mixes positions: convolutions and recurrences, too) share no
    parameter. `down_proj` are the output matrices among `experts`; `all` adds what is in no part,
    such as embeddings and dense blocks. Tensors that only select experts are in none.
    """
    layers = find_moe_layers(model)
    fixed = {id(tensor) for layer in layers for tensor in layer.selection_tensors()}
    every = {n: p for n, p in model.named_parameters() if id(p) not in fixed}
    owner = _owners(model, layers)
    found: dict[Part, dict[str, nn.Parameter]] = {
        part: {n: p for n, p in every.items() if owner.get(id(p)) == part} for part in PARTS
    }
    down = {id(layer.experts.down_proj) for layer in layers}
    return {**found, "down_proj": {n: p for n, p in every.items() if id(p) in down}, "all": every}


def _owners(model: PreTrainedModel, layers: list[MoELayer]) -> dict[int, Part]:
    """The part of a parameter by its identity; blocks of experts claim theirs first."""
    owner: dict[int, Part] = {}
    for layer in layers:
        for part in ("router", "experts", "shared"):
            owner.update({id(p): part for p in layer.parameters_of(part)})
    stack = decoder_layers(model)
    for module in stack.modules():
        if is_norm(module):
            for parameter in module.parameters():
                owner.setdefault(id(parameter), "norm")
    for mixer in (child for layer in stack for child in layer.children() if is_mixer(child)):
        for parameter in mixer.parameters():
            owner.setdefault(id(parameter), "attention")
    return owner


def is_norm(module: nn.Module) -> bool:
    """Says whether a module scales its input feature by feature: its only weight is a vector."""
    weight = getattr(module, "weight", None)
    is_leaf = next(module.children(), None) is None
    return is_leaf and isinstance(weight, nn.Parameter) and weight.dim() == 1


def is_mixer(module: nn.Module) -> bool:
    """Says whether a module mixes positions: it is handed a mask or a cache."""
    names = inspect.signature(module.forward).parameters
    return any(_MIXING_ARGUMENT.search(name) for name in names)


def linear_modules(model: PreTrainedModel, part: Part) -> list[str]:
    """Full names of the linear modules whose weights are of a part."""
    weights = parameters_of_parts(model)[part]
    modules = model.named_modules()
    return [n for n, m in modules if isinstance(m, nn.Linear) and f"{n}.weight" in weights]


def matrices(model: PreTrainedModel, part: Part) -> list[str]:
    """Full names of the matrices of a part, and of its stacks of one matrix for each expert."""
    weights = parameters_of_parts(model)[part]
    # Biases of experts are stacked to tables, which are no matrices.
    smallest = 3 if part == "experts" else 2
    return [name for name, weight in weights.items() if weight.dim() >= smallest]
