"""Batches as the data module gives them, of random tokens."""

import torch
from torch import Tensor

from tests.families import VOCAB_SIZE


def batch(
    rows: int = 3, length: int = 12, *, seed: int = 3, padded: bool = True
) -> dict[str, Tensor]:
    """Rows of tokens; the second ends early, an answer begins late in the first."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[1, length - 4 :] = 0
    is_answer = mask.bool()
    is_answer[0, :3] = False
    return {
        "input_ids": torch.randint(2, VOCAB_SIZE, (rows, length), generator=generator),
        "attention_mask": mask,
        "document": torch.arange(rows)[:, None].expand(-1, length).masked_fill(mask == 0, -1),
        "domain": torch.arange(rows) % 2,
        "valid": torch.ones(rows, dtype=torch.bool),
        "window": torch.arange(rows),
        "is_answer": is_answer,
    }


def rows_of(whole: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Some rows of a batch."""
    return {name: tensor[rows] for name, tensor in whole.items()}


def longer(whole: dict[str, Tensor], more: int) -> dict[str, Tensor]:
    """The same rows with more padding."""
    rows = len(whole["input_ids"])
    padding = {"input_ids": 1, "attention_mask": 0, "document": -1, "is_answer": False}
    return whole | {
        name: torch.cat(
            [whole[name], torch.full((rows, more), value, dtype=whole[name].dtype)], dim=1
        )
        for name, value in padding.items()
    }
