"""Which windows of each domain are taken, and in which order."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from lightning_smoe.data.packing import TokenWindows


def keyed_generator(*key: int | str) -> Generator:
    """A generator seeded by all parts of a key, so that neighbouring keys share nothing."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    # Seven bytes: torch takes seeds of 64 bits, signed or not depending on the call.
    return Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def choose(windows: TokenWindows, max_tokens: int | None, generator: Generator) -> TokenWindows:
    """Draws windows in random order, as many as fit in a budget; a smaller budget takes a prefix.

    Args:
        windows: Windows of one domain.
        max_tokens: Budget in tokens, padding not counted; at least one window is taken. None
            takes all.
        generator: Source of the order.
    """
    order = torch.randperm(len(windows), generator=generator)
    if max_tokens is not None:
        spent = windows.attention_mask.sum(1)[order].cumsum(0)
        order = order[: max(1, int((spent <= max_tokens).sum()))]
    return windows.select(order)


def interleave(parts: Sequence[TokenWindows]) -> TokenWindows:
    """Deals the windows of several domains in turn, so that each prefix is balanced.

    Args:
        parts: Windows of one domain each, all of one length; one that runs out is passed over.
    """
    names = ["input_ids", "attention_mask", "document"]
    if any(part.is_answer is not None for part in parts):
        names.append("is_answer")
    if any(part.isolated for part in parts):
        names.append("position_ids")
    named = [{"position_ids": _running(part)} | part.tensors() for part in parts]
    joined = TokenWindows(
        **{name: torch.cat([tensors[name] for tensors in named]) for name in names},
        domain=torch.cat([torch.full_like(part.domain, i) for i, part in enumerate(parts)]),
        domain_names=tuple(name for part in parts for name in part.domain_names),
    )
    turn = torch.cat([torch.arange(len(part)) for part in parts])
    return joined.select(torch.argsort(turn, stable=True))


def _running(windows: TokenWindows) -> Tensor:
    return torch.arange(windows.input_ids.shape[1]).expand_as(windows.input_ids)
