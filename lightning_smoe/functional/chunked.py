"""A loss over a large vocabulary, taken a few tokens at a time, gradients and all."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.autograd.function import once_differentiable

# So many float32 numbers are 128 MB: one chunk of logits.
_CHUNK_NUMBERS = 1 << 25

# Takes the states of some tokens and which they are; returns what is to be minimised, summed over
# them, and a detached sum for each figure that is reported.
ChunkLoss = Callable[
    [Float[Tensor, "tokens hidden"], slice],
    tuple[Float[Tensor, ""], Float64[Tensor, " objectives"]],
]


def chunk_size_of(vocab_size: int) -> int:
    """Tokens whose float32 logits fill 128 MB, at least one."""
    return max(1, _CHUNK_NUMBERS // vocab_size)


def chunks(num_tokens: int, chunk_size: int) -> Iterator[slice]:
    """Splits tokens into runs of equal length, the last one shorter; an empty one where none are.

    So a loss is called even for a process that has no token in a batch.
    """
    for start in range(0, max(1, num_tokens), chunk_size):
        yield slice(start, min(num_tokens, start + chunk_size))


def chunked(
    loss: ChunkLoss,
    states: Float[Tensor, "tokens hidden"],
    parameters: Sequence[Tensor],
    chunk_size: int,
) -> tuple[Float[Tensor, ""], Float64[Tensor, " objectives"]]:
    """Sums a loss over tokens so that nothing of the size of the vocabulary outlives a chunk.

    Gradients are taken chunk by chunk at once, so that nothing is computed twice; the gradient that
    comes in later only scales them. Without gradients there are only sums.

    Args:
        loss: The loss of a chunk.
        states: What it is a function of.
        parameters: All tensors beside the states that it reads and that need a gradient.
        chunk_size: Tokens of a chunk.

    Returns:
        The sum, differentiable once; the detached sums.
    """
    needed = [tensor for tensor in (states, *parameters) if tensor.requires_grad]
    if torch.is_grad_enabled() and needed:
        apply: Any = _Chunked.apply
        total, sums = apply(loss, chunk_size, states, *parameters)
        return total, sums
    totals = [loss(states[rows], rows) for rows in chunks(len(states), chunk_size)]
    return _summed(totals)


def _summed(
    totals: Sequence[tuple[Float[Tensor, ""], Float64[Tensor, " objectives"]]],
) -> tuple[Float[Tensor, ""], Float64[Tensor, " objectives"]]:
    values, sums = zip(*totals, strict=True)
    return torch.stack(values).sum(), torch.stack(sums).sum(0)


class _Chunked(torch.autograd.Function):
    """Takes the gradients of all chunks in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, loss: ChunkLoss, chunk_size: int, states: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs = (states, *parameters)
        gradients = [_zeros(tensor) if tensor.requires_grad else None for tensor in inputs]
        totals = []
        for rows in chunks(len(states), chunk_size):
            piece = states[rows].detach().requires_grad_(states.requires_grad)
            with torch.enable_grad():
                value, sums = loss(piece, rows)
            totals.append((value.detach(), sums))
            places = (None if gradients[0] is None else gradients[0][rows], *gradients[1:])
            _add_gradients(value, (piece, *parameters), places)
        ctx.save_for_backward(*gradients)
        ctx.types = [tensor.dtype for tensor in inputs]
        total, sums = _summed(totals)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.types, strict=True)
        scaled = (None if saved is None else (saved * gradient).to(dtype) for saved, dtype in pairs)
        return None, None, *scaled


def _add_gradients(
    value: Float[Tensor, ""], sources: Sequence[Tensor], places: Sequence[Tensor | None]
) -> None:
    """Adds the gradient towards each source, where there is a place for it."""
    wanted = [(s, p) for s, p in zip(sources, places, strict=True) if p is not None]
    # As in any backward pass, operations have the types that they had before.
    with torch.autocast(value.device.type, enabled=False):
        found = torch.autograd.grad(value, [source for source, _ in wanted], allow_unused=True)
    for gradient, (_, place) in zip(found, wanted, strict=True):
        if gradient is not None:
            place.add_(gradient)


def _zeros(like: Tensor) -> Tensor:
    """Place for a sum of gradients, in float32 at least."""
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    return torch.zeros_like(like, dtype=dtype)
