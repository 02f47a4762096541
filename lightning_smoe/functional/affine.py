"""A matrix and its bias as one map: the bias is the weight of an input that is always one."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_smoe.functional.experts import ExpertWeights


def input_map(weights: ExpertWeights) -> Float[Tensor, "experts outputs features"]:
    """Joins all that reads an expert's input: rows of `gate_proj` above those of `up_proj`."""
    up = _joined(weights.up_proj, weights.up_bias)
    if weights.gate_proj is None:
        return up
    return torch.cat([_joined(weights.gate_proj, weights.gate_bias), up], dim=1)


def output_map(weights: ExpertWeights) -> Float[Tensor, "experts hidden features"]:
    """Joins `down_proj` and its bias."""
    return _joined(weights.down_proj, weights.down_bias)


def with_input_map(
    weights: ExpertWeights, joined: Float[Tensor, "experts outputs features"]
) -> ExpertWeights:
    """Takes another `input_map`."""
    width = weights.up_proj.shape[1]
    up, up_bias = _parted(joined[:, -width:], weights.up_bias)
    changed = replace(weights, up_proj=up, up_bias=up_bias)
    if weights.gate_proj is None:
        return changed
    gate, gate_bias = _parted(joined[:, :width], weights.gate_bias)
    return replace(changed, gate_proj=gate, gate_bias=gate_bias)


def with_output_map(
    weights: ExpertWeights, joined: Float[Tensor, "experts hidden features"]
) -> ExpertWeights:
    """Takes another `output_map`."""
    down, down_bias = _parted(joined, weights.down_bias)
    return replace(weights, down_proj=down, down_bias=down_bias)


def features_of(
    inputs: Float[Tensor, "tokens ..."], bias: Float[Tensor, "..."] | None
) -> Float[Tensor, "tokens ..."]:
    """Adds the input that is always one, where there is a bias for it."""
    return inputs if bias is None else torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)


def _joined(matrices: Tensor, bias: Tensor | None) -> Tensor:
    return matrices if bias is None else torch.cat([matrices, bias.unsqueeze(2)], dim=2)


def _parted(joined: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (joined, None) if bias is None else (joined[:, :, :-1], joined[:, :, -1])
