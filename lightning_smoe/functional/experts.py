"""The weights of a layer's experts in one layout, whatever the checkpoint's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# From what gate_proj (none where experts are not gated) and up_proj give to what down_proj takes.
Activation = Callable[[Tensor | None, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """Weights of the experts of one layer: `down(act(gate x) * up x)`, or `down(act(up x))`.

    Args:
        up_proj: Input matrices.
        down_proj: Output matrices.
        gate_proj: Gating matrices; none where the experts are not gated.
        gate_bias: Bias added to the gate, where the family has one.
        up_bias: Bias added to `up_proj x`, where the family has one.
        down_bias: Bias added to the output, where the family has one.
    """

    up_proj: Float[Tensor, "experts intermediate hidden"]
    down_proj: Float[Tensor, "experts hidden intermediate"]
    gate_proj: Float[Tensor, "experts intermediate hidden"] | None = None
    gate_bias: Float[Tensor, "experts intermediate"] | None = None
    up_bias: Float[Tensor, "experts intermediate"] | None = None
    down_bias: Float[Tensor, "experts hidden"] | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "ExpertWeights":
        """Applies one change to every tensor that is there (experts on the first axis)."""
        present: dict[str, Tensor | None] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: t if t is None else change(t) for k, t in present.items()}
        return ExpertWeights(**changed)

    def select(self, experts: Int[Tensor, " members"]) -> "ExpertWeights":
        """Takes the named experts, in that order."""
        return self.map(lambda tensor: tensor[experts])

    def activations(
        self, states: Float[Tensor, "tokens hidden"], expert: int, activate: Activation
    ) -> Float[Tensor, "tokens intermediate"]:
        """What an expert's output matrix multiplies."""
        gate = None
        if self.gate_proj is not None:
            gate = _affine(states, self.gate_proj, self.gate_bias, expert)
        return activate(gate, _affine(states, self.up_proj, self.up_bias, expert))

    def outputs(
        self, states: Float[Tensor, "tokens hidden"], expert: int, activate: Activation
    ) -> Float[Tensor, "tokens hidden"]:
        """An expert's output before its routing weight."""
        hidden = self.activations(states, expert, activate)
        return _affine(hidden, self.down_proj, self.down_bias, expert)

    def with_down(self, down_proj: Float[Tensor, "experts hidden intermediate"]) -> "ExpertWeights":
        """Takes other output matrices."""
        return replace(self, down_proj=down_proj)

    @staticmethod
    def stack(parts: Sequence["ExpertWeights"]) -> "ExpertWeights":
        """Puts the experts of several into one, in order."""
        present = [f.name for f in fields(parts[0]) if getattr(parts[0], f.name) is not None]
        return ExpertWeights(**{k: torch.cat([getattr(p, k) for p in parts]) for k in present})


def _affine(states: Tensor, matrices: Tensor, biases: Tensor | None, expert: int) -> Tensor:
    product = states.to(matrices.dtype) @ matrices[expert].T
    return product if biases is None else product + biases[expert]
