"""Running a model one decoder layer at a time, over batches that wait between layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_smoe.models.head import model_inputs
from lightning_smoe.models.layer import decoder_layer_of, find_moe_layers

# One sequence of so many is held out.
_HELD_OUT = 5


@dataclass(eq=False)
class WaitingBatch:
    """A batch between two decoder layers.

    Args:
        states: Hidden states that the next layer will read.
        calls: For each layer, the other arguments that the model gives it (masks, positions).
        is_token: Which positions count: neither padding nor a repeat.
        held_out: Sequences on which fits are judged.
    """

    states: Float[Tensor, "batch sequence hidden"]
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    is_token: Bool[Tensor, "batch sequence"]
    held_out: Bool[Tensor, " batch"]

    def moved(self, states: Float[Tensor, "batch sequence hidden"]) -> "WaitingBatch":
        """The same batch one layer on."""
        return replace(self, states=states)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers that holds the mixture-of-experts blocks."""
    # By name alone: adapters may be wrapped around what lies under it.
    names = (name for name, _ in model.named_modules() if name.endswith(".experts"))
    first = next(names, None) or find_moe_layers(model)[0].name
    path, _ = decoder_layer_of(first)
    layers = model.get_submodule(path)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"{path} is not a list of layers")
    return layers


@torch.no_grad()
def embed(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    is_token: Bool[Tensor, "batch sequence"],
) -> WaitingBatch:
    """Runs all that comes before the first decoder layer, and notes how the layers are called.

    Args:
        model: The model.
        batch: As for `final_states`.
        is_token: Which positions count.
    """
    states: list[Tensor] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        states.append(hidden)
        calls.append((args, kwargs))
        return hidden

    with _replaced_forward(decoder_layers(model), note):
        model.base_model(**model_inputs(batch), use_cache=False)
    # By the text alone, so that neither batches nor processes change what is held out.
    held_out = (batch["input_ids"] * is_token).sum(1) % _HELD_OUT == 0
    return WaitingBatch(states[0], calls, is_token, held_out)


@torch.no_grad()
def run_layer(layer: nn.Module, batch: WaitingBatch, index: int) -> Float[Tensor, "..."]:
    """Hidden states behind one decoder layer."""
    args, kwargs = batch.calls[index]
    output = layer(batch.states, *args, **kwargs)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


@torch.no_grad()
def finish(
    model: PreTrainedModel, batch: Mapping[str, Tensor], states: Float[Tensor, "..."]
) -> Float[Tensor, "batch sequence hidden"]:
    """Runs all that comes between the last decoder layer and the head.

    Args:
        model: The model.
        batch: As for `final_states`.
        states: Hidden states behind the last decoder layer.
    """
    with _replaced_forward(decoder_layers(model), lambda *_args, **_kwargs: states):
        final: Tensor = model.base_model(**model_inputs(batch), use_cache=False)[0]
    return final


@contextmanager
def _replaced_forward(layers: nn.ModuleList, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Lets the model call `forward` in the place of each decoder layer."""
    for layer in layers:
        layer.forward = MethodType(lambda _, *args, **kwargs: forward(*args, **kwargs), layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
