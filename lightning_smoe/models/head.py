"""A causal language model in two halves: hidden states in front of its head, and their logits."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from lightning_smoe.errors import InputError
from lightning_smoe.models.expert_count import text_config

# Relative; far above the rounding of bfloat16 states, far below what two more tokens do to them.
_UNCHANGED = 0.02


def final_states(
    model: PreTrainedModel, batch: Mapping[str, Tensor]
) -> Float[Tensor, "batch sequence hidden"]:
    """Hidden states that the head reads, with gradients where they are on.

    Args:
        model: A causal language model, in any mode.
        batch: Has `input_ids`, and `position_ids` where the documents of a window are isolated
            from each other, else `attention_mask`.
    """
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0])

    hook = model.base_model.register_forward_hook(keep)
    try:
        # The whole model, not its base alone: sharding and offloading hang on this call.
        model(**model_inputs(batch), use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return found[0]


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a model is given of a batch: positions that start anew say where a document ends."""
    key = "position_ids" if "position_ids" in batch else "attention_mask"
    return {"input_ids": batch["input_ids"], key: batch[key]}


def logits_of(
    model: PreTrainedModel, states: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens vocab"]:
    """What the model's own head makes of final states, scaled and capped as its family does."""
    # A second object of the same class that shares all but the base, so that nothing is changed.
    shadow = object.__new__(type(model))
    modules = {**model._modules, model.base_model_prefix: _Known(states)}
    shadow.__dict__.update(model.__dict__, _modules=modules)
    output: Any = type(model).forward(shadow, use_cache=False)
    logits: Tensor = output.logits[0]
    return logits


def head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Trainable parameters that `logits_of` reads, an embedding that is tied to them included.

    To be asked for in each step: sharding puts others in their place.
    """
    children = [m for n, m in model.named_children() if n != model.base_model_prefix]
    found = {id(p): p for m in children for p in m.parameters() if p.requires_grad}
    return list(found.values())


def vocab_size_of(model: PreTrainedModel) -> int:
    """Tokens that the head tells apart."""
    return int(text_config(model.config).vocab_size)


@torch.no_grad()
def check_isolates(
    model: PreTrainedModel, states_of: Callable[[Mapping[str, Tensor]], Tensor] | None = None
) -> None:
    """Checks that positions that start anew keep documents of a window from seeing each other.

    Args:
        model: The model.
        states_of: Gives its final hidden states of a batch, if it is not whole in memory.

    Raises:
        InputError: The family attends across them all the same (gpt-oss in transformers 5.23).
    """
    device = torch.device("cpu") if states_of is not None else model.device
    # The second document is the same in both windows, the first is not.
    windows = torch.tensor([[3, 4, 7, 8], [5, 6, 7, 8]], device=device)
    positions = torch.tensor([0, 1, 0, 1], device=device).expand_as(windows)
    batch = {"input_ids": windows, "position_ids": positions}
    states = (states_of(batch) if states_of is not None else final_states(model, batch)).float()
    first, second = states[:, 2:]
    if (first - second).norm() > _UNCHANGED * first.norm():
        raise InputError(
            f"a {model.config.model_type} lets documents that are packed into one window see each "
            "other; give each a window of its own by data.pack=false"
        )


class _Known(nn.Module):
    """Stands in for the base of a model whose final states are known."""

    def __init__(self, states: Float[Tensor, "tokens hidden"]) -> None:
        super().__init__()
        self._states = states

    def forward(self, **_: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self._states.unsqueeze(0))
