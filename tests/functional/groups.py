"""A small group of experts with the tokens it saw, for tests of merging and alignment."""

import torch

from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.merging import GroupTokens
from tests.functional.layers import random_weights, swiglu

# Whether experts are gated, and whether they have biases.
KINDS = {"gated": (True, False), "biased": (True, True), "plain": (False, False)}
SHARES = torch.tensor([0.2, 0.5, 0.1])


def group_of(
    kind: str = "biased", num_members: int = 3, dtype: torch.dtype = torch.float32
) -> ExpertWeights:
    """Experts of five neurons on eight hidden dimensions."""
    gated, biased = KINDS[kind]
    return random_weights(num_members, gated=gated, biased=biased, dtype=dtype)


def tokens_of(num_members: int = 3, dtype: torch.dtype = torch.float32) -> GroupTokens:
    """Sixty tokens, of which some visit no member."""
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(60, 8, generator=generator)
    gates = torch.rand(60, num_members, generator=generator)
    visits = torch.rand(60, num_members, generator=generator) < 0.5
    return GroupTokens(states.to(dtype), (gates * visits).to(dtype), swiglu)


def reordered(expert: ExpertWeights, order: list[int]) -> ExpertWeights:
    """Puts the neurons of every expert in another order."""
    width = expert.up_proj.shape[1]
    moved = expert.map(lambda part: part[:, order] if part.shape[1] == width else part)
    return moved.with_down(expert.down_proj[:, :, order])
