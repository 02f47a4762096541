"""Hooks that see what the router of each layer did with real tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import MoELayer


@dataclass(frozen=True, eq=False)
class RoutedTokens:
    """What one layer did with one batch; positions that are no tokens are left out.

    Args:
        states: What the experts read.
        router_logits: The router's raw scores.
        routing_weights: Weight of each selected expert, as multiplied with its output.
        expert_indices: The selected experts; one stands twice where two router rows that share it
            are selected.
        domain: Domain of each token, as a number.
        outputs: Output of each selected expert before its weight; none unless asked for.
    """

    states: Float[Tensor, "tokens hidden"]
    router_logits: Float[Tensor, "tokens experts"]
    routing_weights: Float[Tensor, "tokens top_k"]
    expert_indices: Int[Tensor, "tokens top_k"]
    domain: Int[Tensor, " tokens"]
    outputs: Float[Tensor, "tokens top_k hidden"] | None


# Numbers that are weighted in one go: 1 MB in float32, which stays in the caches and needs no new
# memory from the system each time.
_FEW_NUMBERS = 1 << 18

Consumer = Callable[[MoELayer, RoutedTokens], None]


@dataclass(eq=False)
class Batch:
    """Which positions of the batch that runs now are tokens, and their domains.

    Args:
        is_token: False at padding and at sequences repeated to fill a batch; flattened.
        domain: Domain number of every position; flattened.
    """

    is_token: Bool[Tensor, " positions"]
    domain: Int[Tensor, " positions"]


@contextmanager
def observing(
    layers: Sequence[MoELayer],
    batch: Callable[[], Batch],
    consume: Consumer,
    with_outputs: bool = False,
) -> Iterator[None]:
    """Calls `consume` with what each layer did, for every forward pass within.

    Args:
        layers: Layers to watch.
        batch: Returns the batch that runs now.
        consume: Receives the layer and its tokens.
        with_outputs: Also hand over every selected expert's output. The experts then run once, on
            one row for each selected expert, and their weighted sum is formed here: the same
            arithmetic as the model's own, so nothing is computed twice.
    """
    with ExitStack() as stack:
        for layer in layers:
            watch = _LayerWatch(layer, batch, consume)
            hooks = [layer.router.register_forward_hook(watch.note_logits)]
            before = watch.spread if with_outputs else watch.note_routing
            hooks.append(layer.experts.register_forward_pre_hook(before, with_kwargs=True))
            if with_outputs:
                hooks.append(layer.experts.register_forward_hook(watch.gather))
            for hook in hooks:
                stack.callback(hook.remove)
        yield


class _LayerWatch:
    """The hooks of one layer, which hand what they see to each other."""

    _logits: Tensor
    _states: Tensor
    _indices: Tensor
    _weights: Tensor

    def __init__(self, layer: MoELayer, batch: Callable[[], Batch], consume: Consumer) -> None:
        self._layer, self._batch, self._consume = layer, batch, consume

    def note_logits(self, _: Any, __: Any, output: Any) -> None:
        self._logits = self._layer.router_logits(output)

    def note_routing(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._states, self._indices, self._weights = (*args, *kwargs.values())
        self._hand_over(None)

    def spread(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        self._states, self._indices, self._weights = (*args, *kwargs.values())
        weights = self._weights
        rows = self._states.repeat_interleave(weights.shape[1], dim=0)
        return (rows, self._indices.reshape(-1, 1), weights.new_ones(weights.numel(), 1)), {}

    def gather(self, _: Any, __: Any, outputs: Tensor) -> Tensor:
        outputs = outputs.view(*self._weights.shape, -1)
        self._hand_over(outputs)
        few = max(1, _FEW_NUMBERS // outputs.shape[1:].numel())
        parts = zip(outputs.split(few), self._weights.split(few), strict=True)
        weighted = torch.cat([(part * weights.unsqueeze(-1)).sum(1) for part, weights in parts])
        return weighted.to(self._states.dtype)

    def _hand_over(self, outputs: Tensor | None) -> None:
        batch = self._batch()
        real = batch.is_token
        if bool(real.all()):
            real = slice(None)  # type: ignore[assignment]  # no copy where every position counts
        logits = self._logits[real]
        if not bool(torch.isfinite(logits).all()):
            raise InputError(
                f"{self._layer.name}: NaN or infinite numbers reach the router, so the states "
                f"overflow {logits.dtype} in this layer or before; set model.dtype=float32 or "
                "bfloat16, or check the checkpoint with python -m lightning_smoe verify"
            )
        self._consume(
            self._layer,
            RoutedTokens(
                self._states[real],
                logits,
                self._weights[real],
                self._layer.experts_of(self._indices[real]),
                batch.domain[real],
                None if outputs is None else outputs[real],
            ),
        )
