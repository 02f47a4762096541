"""How a block's output enters the residual stream of its decoder layer."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_smoe.compression.record import relative_rounding
from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import MoELayer


@torch.no_grad()
def output_factor(
    layer: MoELayer, is_token: Bool[Tensor, "batch sequence"], run: Callable[[], Tensor]
) -> float:
    """The c of `layer output = something + c * block output`; 1 in nearly all families.

    Args:
        layer: The block.
        is_token: Which positions count.
        run: Runs the decoder layer once.

    Raises:
        InputError: The layer's output is no such sum, as where a norm follows the block.
    """
    outputs: list[Tensor] = []

    def double(_module: Any, _args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        outputs.append(first.reshape(*is_token.shape, -1)[is_token])
        return (2 * first, *output[1:]) if isinstance(output, tuple) else 2 * first

    before = run()[is_token]
    hook = layer.block.register_forward_hook(double)
    try:
        change = (run()[is_token] - before).double()
    finally:
        hook.remove()
    output = outputs[0].double()
    energy = output.square().sum()
    factor = float((change * output).sum() / energy) if energy > 0 else 1.0
    error = (change - factor * output).norm()
    rounding = relative_rounding(before.dtype)
    if not error <= rounding * max(before.double().norm(), output.norm()):
        raise InputError(
            f"{layer.name}: its decoder layer does more to its output than to add it, so drift "
            "cannot be told from it; set model.recipe.init_args.refit.init_args.correct_drift to "
            "false"
        )
    # What is added as it is should not be scaled by rounding.
    return 1.0 if abs(factor - 1) < rounding else factor


def output_wanted(
    teacher_states: Float[Tensor, "tokens hidden"],
    states: Float[Tensor, "tokens hidden"],
    output: Float[Tensor, "tokens hidden"],
    factor: float,
) -> Float[Tensor, "tokens hidden"]:
    """The block output that would take the compressed model's states to the original's.

    Args:
        teacher_states: Hidden states behind the original's decoder layer.
        states: The same of the compressed model, as it is now.
        output: What its block added to them.
        factor: What that was multiplied with, see `output_factor`.
    """
    return output.float() + (teacher_states.float() - states.float()) / factor
