"""Which positions of a batch are learned from and judged."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


def counted_positions(batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch sequence"]:
    """Says at which positions the next token is one to be learned.

    It is real and part of an answer, stands in the same document where documents are isolated,
    and its row does not only fill up a batch.
    """
    real = batch["attention_mask"].bool()
    counted = torch.zeros_like(real)
    follows = real[:, 1:] & real[:, :-1] & batch["is_answer"][:, 1:].bool()
    if "position_ids" in batch:
        positions = batch["position_ids"]
        follows = follows & (positions[:, 1:] == positions[:, :-1] + 1)
    counted[:, :-1] = follows & batch["valid"].bool()[:, None]
    return counted


def flat_positions(counted: Bool[Tensor, "batch sequence"]) -> Int64[Tensor, " tokens"]:
    """Places of counted positions in the flattened batch, row by row; waits for the device."""
    return counted.flatten().nonzero().squeeze(1)


def next_tokens(
    batch: Mapping[str, Tensor], positions: Int64[Tensor, " tokens"]
) -> Int64[Tensor, " tokens"]:
    """The token behind each counted position."""
    # The last position of a row is never counted, so the next place is in the same row.
    return batch["input_ids"].flatten().index_select(0, positions + 1)
