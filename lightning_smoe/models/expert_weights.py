"""The experts of transformers, in whatever memory layout, to and from one layout."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.models.router import assign


def is_understood(experts: Any) -> bool:
    """Says whether a module holds its experts as this file reads them."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "down_proj")
    has_norm = getattr(experts, "has_post_expert_norm", False)
    if has_norm or not all(hasattr(experts, flag) for flag in flags):
        return False
    return hasattr(experts, "gate_up_proj" if experts.has_gate else "up_proj")


def read_weights(experts: Any) -> ExpertWeights:
    """The weights in one layout: gate apart from up, outputs on the second axis."""

    def matrix(name: str) -> Tensor:
        tensor: Tensor = getattr(experts, name)
        return tensor.transpose(1, 2) if experts.is_transposed else tensor

    up = matrix("gate_up_proj" if experts.has_gate else "up_proj")
    up_bias = getattr(experts, "gate_up_proj_bias" if experts.has_gate else "up_proj_bias", None)
    gate = gate_bias = None
    if experts.has_gate:
        gate, up = _split(experts, up)
        gate_bias, up_bias = (None, None) if up_bias is None else _split(experts, up_bias)
    down_bias = getattr(experts, "down_proj_bias", None)
    return ExpertWeights(up, matrix("down_proj"), gate, gate_bias, up_bias, down_bias)


def store_weights(experts: Any, weights: ExpertWeights) -> None:
    """Puts other experts, in whatever number, in the place of those that are there."""

    def store(name: str, tensor: Tensor) -> None:
        flip = experts.is_transposed and tensor.dim() > 2  # biases have two axes
        assign(experts, name, tensor.transpose(1, 2) if flip else tensor)

    prefix = "up"
    up, up_bias = weights.up_proj, weights.up_bias
    if weights.gate_proj is not None:
        prefix, up = "gate_up", _join(experts, weights.gate_proj, weights.up_proj)
    if weights.gate_bias is not None and weights.up_bias is not None:
        up_bias = _join(experts, weights.gate_bias, weights.up_bias)
    store(f"{prefix}_proj", up)
    store("down_proj", weights.down_proj)
    if up_bias is not None:
        store(f"{prefix}_proj_bias", up_bias)
    if weights.down_bias is not None:
        store("down_proj_bias", weights.down_bias)


def activations_of(
    experts: Any, states: Float[Tensor, "tokens hidden"], expert: int
) -> Float[Tensor, "tokens intermediate"]:
    """What an expert's output matrix is applied to."""
    prefix = "gate_up_proj" if experts.has_gate else "up_proj"
    matrix = getattr(experts, prefix)[expert]
    hidden = states @ (matrix if experts.is_transposed else matrix.T)
    if experts.has_bias:
        hidden = hidden + getattr(experts, f"{prefix}_bias")[expert]
    apply = experts._apply_gate if experts.has_gate else experts.act_fn
    activated: Tensor = apply(hidden)
    return activated


def activate(
    experts: Any,
    gate: Float[Tensor, "tokens intermediate"] | None,
    up: Float[Tensor, "tokens intermediate"],
) -> Float[Tensor, "tokens intermediate"]:
    """The experts' activation, from what `gate_proj` and `up_proj` give."""
    joint = up if gate is None else _join(experts, gate, up)
    activated: Tensor = (experts.act_fn if gate is None else experts._apply_gate)(joint)
    return activated


def _split(experts: Any, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    if experts.is_concatenated:
        gate, up = gate_up.chunk(2, dim=1)
        return gate, up
    return gate_up[:, ::2], gate_up[:, 1::2]


def _join(experts: Any, gate: Tensor, up: Tensor) -> Tensor:
    if experts.is_concatenated:
        return torch.cat([gate, up], dim=1)
    return torch.stack([gate, up], dim=2).flatten(1, 2)
