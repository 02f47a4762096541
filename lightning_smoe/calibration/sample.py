"""A sample of the calibration tokens of each layer, kept whole to compare experts on."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lightning_smoe.calibration.observer import RoutedTokens
from lightning_smoe.functional.evidence import TokenSample
from lightning_smoe.models.progress import Reduce


def is_sampled(
    document: Int[Tensor, "batch sequence"], stride: int
) -> Bool[Tensor, "batch sequence"]:
    """Marks every so many positions of each sequence.

    It depends on the text alone, so neither batches nor processes change the sample. Sequences
    start at different phases, or the sample would hold the same positions of all.

    Args:
        document: Number of the document of each token.
        stride: Takes one position of so many, at least 1.
    """
    position = torch.arange(document.shape[1], device=document.device)
    return (position + document[:, :1]) % stride == 0


def take(tokens: RoutedTokens, sampled: Bool[Tensor, " tokens"]) -> TokenSample:
    """Copies the sampled tokens."""
    return TokenSample(
        tokens.states[sampled].clone(),
        tokens.router_logits[sampled].float(),
        tokens.routing_weights[sampled].float(),
        tokens.expert_indices[sampled].long(),
    )


def joined(parts: Sequence[TokenSample]) -> TokenSample:
    """Puts the samples of several batches into one."""
    tensors = {k: torch.cat([getattr(p, k) for p in parts]) for k in field_names()}
    return TokenSample(**tensors)


def gathered(sample: TokenSample, rank: int, reduce: Reduce) -> TokenSample:
    """Puts the samples of all processes into one, in order of rank.

    Args:
        sample: This process's.
        rank: Number of this process.
        reduce: Sum of a tensor over processes.
    """
    size = len(sample.states)
    here = torch.zeros(rank + 1, dtype=torch.int64, device=sample.states.device)
    here[rank] = size
    most = int(reduce(here.new_tensor(rank), "max")) + 1
    sizes = reduce(torch.nn.functional.pad(here, (0, most - len(here))), "sum")
    start, total = int(sizes[:rank].sum()), int(sizes.sum())
    placed: dict[str, Any] = {}
    for name in field_names():
        tensor = getattr(sample, name)
        every = tensor.new_zeros(total, *tensor.shape[1:])
        every[start : start + size] = tensor
        placed[name] = reduce(every, "sum")
    return TokenSample(**placed)


def field_names() -> tuple[str, ...]:
    """Names of the tensors of a sample."""
    return tuple(field.name for field in fields(TokenSample))
