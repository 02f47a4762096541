"""Objectives on tokens at each position by itself, for judging a student domain by domain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.data.positions import counted_positions, flat_positions, next_tokens
from lightning_smoe.functional.chunked import chunk_size_of, chunks
from lightning_smoe.functional.targets import TeacherTokens, UnknownTokens
from lightning_smoe.models.head import final_states, logits_of, vocab_size_of
from lightning_smoe.training.objectives import TokenObjective
from lightning_smoe.training.teacher import Teacher, TeacherAnswer

Batch = Mapping[str, Tensor]


def values_of(
    objectives: Sequence[TokenObjective],
    logits: Float[Tensor, "tokens vocab"],
    answer: TeacherAnswer | None,
    asked: tuple[slice, Int64[Tensor, " _"]],
) -> Float[Tensor, "objectives tokens"]:
    """Each objective at each token of a chunk.

    Args:
        objectives: Objectives on tokens.
        logits: The student's, of the chunk.
        answer: What the teacher says of the batch, if it was asked.
        asked: Which of the batch's counted tokens the chunk has, and the targets of all of them.
    """
    rows, targets = asked
    teacher: TeacherTokens = UnknownTokens() if answer is None else answer.tokens(rows)
    return torch.stack([o(teacher, logits, targets[rows]) for o in objectives])


@dataclass(frozen=True, eq=False)
class PositionValues:
    """Objectives at each counted position of a batch.

    Args:
        values: Their values, in nats.
        rows: The row of the batch that each position is in.
    """

    values: Float[Tensor, "objectives tokens"]
    rows: Int64[Tensor, " tokens"]


@torch.no_grad()
def position_values(
    student: PreTrainedModel,
    teacher: Teacher,
    batch: Batch,
    objectives: Sequence[TokenObjective],
    *,
    split: str = "valid",
) -> PositionValues:
    """Objectives at each counted position of a batch, without gradients, a chunk at a time."""
    counted = counted_positions(batch)
    positions = flat_positions(counted)
    is_asked = any(objective.needs_teacher for objective in objectives)
    answer = teacher.answer(batch, counted, split, False) if is_asked else None
    states = final_states(student, batch).flatten(0, 1).index_select(0, positions)
    targets = next_tokens(batch, positions)
    chunk_size = chunk_size_of(vocab_size_of(student))
    values = [
        values_of(objectives, logits_of(student, states[rows]), answer, (rows, targets))
        for rows in chunks(len(states), chunk_size)
    ]
    return PositionValues(torch.cat(values, 1), positions // counted.shape[1])
