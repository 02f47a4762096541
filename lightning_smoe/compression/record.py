"""What a mixture-of-experts block read and wrote while its decoder layer ran."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_smoe.calibration.observer import Batch, RoutedTokens, observing
from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import MoELayer

# Largest relative error of a block's output put together again from its parts: in float32, and in
# units of rounding below it.
_FLOAT32_ERROR, _ROUNDING = 1e-3, 16


def relative_rounding(dtype: torch.dtype) -> float:
    """Largest relative error of a sum that is formed in another order, in this type."""
    return max(_FLOAT32_ERROR, _ROUNDING * torch.finfo(dtype).eps)


@dataclass(frozen=True, eq=False)
class BlockRecord:
    """One batch in one block; positions that are no tokens are left out.

    Args:
        tokens: What the router did.
        shared: What the shared expert's output matrix multiplies, times its gate; none if absent.
        output: What the block adds to the residual stream.
    """

    tokens: RoutedTokens
    shared: Float[Tensor, "tokens shared"] | None
    output: Float[Tensor, "tokens hidden"]


def record(
    layer: MoELayer, is_token: Bool[Tensor, "batch sequence"], run: Callable[[], Any]
) -> tuple[BlockRecord, Any]:
    """Runs a decoder layer and notes what happens in its block.

    Args:
        layer: The block.
        is_token: Which positions count.
        run: Runs the decoder layer once.

    Returns:
        The record, and what `run` returned.
    """
    flat = is_token.reshape(-1)
    batch = Batch(flat, torch.zeros_like(flat, dtype=torch.int64))
    seen: dict[str, Tensor] = {}
    tokens: list[RoutedTokens] = []

    def note(key: str, tensor: Any) -> None:
        tensor = tensor[0] if isinstance(tensor, tuple) else tensor
        seen[key] = tensor.reshape(-1, tensor.shape[-1])[flat]

    with ExitStack() as stack:
        stack.enter_context(observing([layer], lambda: batch, lambda _, t: tokens.append(t)))
        block_hook = layer.block.register_forward_hook(
            lambda _module, _args, out: note("output", out)
        )
        stack.callback(block_hook.remove)
        if layer.shared_expert is not None:
            down_proj, gate = layer.shared_expert
            hook = down_proj.register_forward_pre_hook(
                lambda _module, args: note("shared", args[0])
            )
            stack.callback(hook.remove)
            if gate is not None:
                hook = gate.register_forward_hook(lambda _module, _args, out: note("gate", out))
                stack.callback(hook.remove)
        result = run()
    shared = seen.get("shared")
    if shared is not None and "gate" in seen:
        shared = shared * seen["gate"].sigmoid()
    return BlockRecord(tokens[0], shared, seen["output"]), result


@dataclass(frozen=True, eq=False)
class OutputFeatures:
    """What the output matrices of experts and shared expert multiply, side by side.

    Expert e fills columns e * intermediate to (e + 1) * intermediate with its activations times
    its routing weight, zero for tokens not routed to it; the shared expert comes last.

    Args:
        values: The features.
        blocks: Columns of each expert with the tokens for which they are not zero.
    """

    values: Float[Tensor, "tokens features"]
    blocks: list[tuple[slice, Tensor | slice]]


def output_features(layer: MoELayer, block: BlockRecord) -> OutputFeatures:
    """Computes the features of one batch."""
    tokens = block.tokens
    width = layer.intermediate_size
    routed = tokens.states.new_zeros(len(tokens.states), layer.num_experts * width)
    blocks: list[tuple[slice, Tensor | slice]] = []
    for expert in tokens.expert_indices.unique().tolist():
        rows, values = expert_features(layer, block, expert)
        columns = slice(expert * width, (expert + 1) * width)
        routed[rows, columns] = values
        blocks.append((columns, rows))
    if block.shared is None:
        return OutputFeatures(routed, blocks)
    blocks.append((slice(routed.shape[1], None), slice(None)))
    return OutputFeatures(torch.cat([routed, block.shared], dim=1), blocks)


def expert_features(
    layer: MoELayer, block: BlockRecord, expert: int
) -> tuple[Tensor | slice, Float[Tensor, "active intermediate"]]:
    """One expert's part of the features, for the tokens for which it is not zero.

    Args:
        layer: The block.
        block: What it did.
        expert: Number of the expert; one more than the last is the shared expert.

    Returns:
        Those tokens, and the features.
    """
    if expert == layer.num_experts and block.shared is not None:
        return slice(None), block.shared
    tokens = block.tokens
    selected = tokens.expert_indices == expert
    rows = selected.any(1).nonzero().squeeze(1)
    # A sum: rows of the router that share an expert may both be selected.
    gates = (tokens.routing_weights * selected)[rows].sum(1).to(tokens.states.dtype)
    return rows, layer.activations(tokens.states[rows], expert) * gates[:, None]


def output_weights(layer: MoELayer) -> Float[Tensor, "hidden features"]:
    """The matrices that multiply `output_features`, side by side."""
    parts = [layer.weights().down_proj.transpose(0, 1).flatten(1)]
    if layer.shared_expert is not None:
        parts.append(layer.shared_expert[0].weight)
    return torch.cat(parts, dim=1)


def bias_output(layer: MoELayer, block: BlockRecord) -> Float[Tensor, "tokens hidden"]:
    """The part of a block's output that comes from biases of output matrices."""
    output = torch.zeros_like(block.output)
    biases = layer.weights().down_bias
    if biases is not None:
        gates = block.tokens.routing_weights.to(output.dtype)
        output += (biases[block.tokens.expert_indices] * gates[..., None]).sum(1)
    shared = layer.shared_expert
    if shared is not None and shared[0].bias is not None:
        if shared[1] is not None:
            raise InputError(f"{layer.name}: a gated shared expert with an output bias")
        output += shared[0].bias
    return output


def shared_output(layer: MoELayer, block: BlockRecord) -> Float[Tensor, "tokens hidden"]:
    """The part of a block's output that comes from its shared expert; zero where it has none."""
    if block.shared is None or layer.shared_expert is None:
        return torch.zeros_like(block.output)
    down_proj = layer.shared_expert[0]
    return torch.nn.functional.linear(block.shared, down_proj.weight, down_proj.bias)


def check_understood(
    layer: MoELayer, block: BlockRecord, features: Float[Tensor, "tokens features"]
) -> None:
    """Compares a block's output with the sum of the parts that are known.

    Args:
        layer: The block.
        block: What it did.
        features: Its `output_features`.

    Raises:
        InputError: They differ: the block does something that the refit does not know.
    """
    rebuilt = features.float() @ output_weights(layer).float().T + bias_output(layer, block).float()
    error, size = (rebuilt - block.output.float()).norm(), block.output.float().norm()
    tolerance = relative_rounding(block.output.dtype)
    # Not the quotient: a process whose batch holds repeats only has no token, and 0 <= 0.
    if not error <= tolerance * size:
        raise InputError(
            f"{layer.name}: the block's output is not the weighted sum of its experts and shared "
            f"expert (off by {error / size:.1e}); set model.recipe.init_args.refit to null for it"
        )


@torch.no_grad()
def set_output_weights(layer: MoELayer, weights: Float[Tensor, "hidden features"]) -> None:
    """Puts `output_weights` back into experts and shared expert, in place."""
    old = layer.weights()
    routed = weights[:, : layer.num_experts * layer.intermediate_size]
    down = routed.unflatten(1, (layer.num_experts, -1)).transpose(0, 1)
    layer.store(old.with_down(down))
    if layer.shared_expert is not None:
        matrix = layer.shared_expert[0].weight
        matrix.copy_(weights[:, routed.shape[1] :])
