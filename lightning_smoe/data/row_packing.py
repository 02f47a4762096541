"""Rows of a prompt with its answer as windows: whole, or shortened where they are too long."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_smoe.data.packing import TokenWindows, blank_windows, place
from lightning_smoe.data.row_tokens import RowTokens, tokenize_rows
from lightning_smoe.data.rows import Row
from lightning_smoe.errors import InputError

logger = logging.getLogger(__name__)


def window_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    domain: str,
    first_document: int = 0,
    pack: bool = True,
    answers_only: bool = True,
) -> TokenWindows:
    """Gives each row a window of its own, or places whole rows into windows that share none.

    Packed rows are isolated from each other by positions that start anew. The first token of a
    row is never to be learned: nothing stands before it.

    Args:
        rows: Rows of one domain; one without an answer gets no place.
        tokenizer: Gives token ids, padding and the chat template.
        sequence_length: Tokens a window; longer rows are shortened.
        domain: Name of the domain.
        first_document: Number of the first row.
        pack: Whether windows hold several rows.
        answers_only: Whether only answers are to be learned; otherwise every token is.

    Raises:
        InputError: No row has an answer, or the chat template cannot be used.
    """
    cut, numbered = 0, {}
    for number, whole in enumerate(tokenize_rows(rows, tokenizer), first_document):
        row = shorten(whole, sequence_length)
        cut += int(row.is_answer.sum()) < int(whole.is_answer.sum())
        learned = row.is_answer.clone() if answers_only else torch.ones_like(row.is_answer)
        learned[:1] = False
        if bool(learned.any()):
            numbered[number] = RowTokens(row.ids, learned)
    _tell(domain, cut, len(rows) - len(numbered), len(rows))
    if not numbered:
        raise InputError(f"no row of domain {domain!r} has an answer -> add rows that have one")
    lengths = [len(row) for row in numbered.values()]
    places = first_fit(lengths, sequence_length) if pack else [(i, 0) for i in range(len(numbered))]
    num_windows = 1 + max(window for window, _ in places)
    blank = blank_windows(num_windows, sequence_length, tokenizer, domain)
    windows = _fill(blank, places, numbered)
    if not pack:
        return windows
    return replace(windows, position_ids=positions_of(windows.document))


def shorten(row: RowTokens, sequence_length: int) -> RowTokens:
    """Takes tokens away until a row fits, those that cost least first.

    First what follows the last answer, then the beginning of the prompt, of which the last token
    stays, and only then the end of the answer.

    Args:
        row: A row.
        sequence_length: Most tokens that it may have.
    """
    excess = len(row) - sequence_length
    if excess <= 0:
        return row
    answers = row.is_answer.nonzero().squeeze(1).tolist() or [len(row) - 1]
    behind = min(excess, len(row) - 1 - answers[-1])
    left = min(excess - behind, max(0, answers[0] - 1))
    kept = slice(left, left + sequence_length)
    return RowTokens(row.ids[kept], row.is_answer[kept])


def first_fit(lengths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Places rows in the first window that has room for them, in their order.

    Args:
        lengths: Tokens of each row, at most `room`.
        room: Tokens a window.

    Returns:
        Window and position of each row.
    """
    left = numpy.full(len(lengths), room, dtype=numpy.int64)
    shortest, first, used, places = min(lengths), 0, 0, []
    for length in lengths:
        # Full windows at the front are not looked at again, nor empty ones but the next.
        while left[first] < shortest:
            first += 1
        window = first + int(numpy.argmax(left[first : used + 1] >= length))
        used = max(used, window + 1)
        places.append((window, room - int(left[window])))
        left[window] -= length
    return places


def positions_of(document: Tensor) -> Tensor:
    """Position of each token in its document, or in its stretch of padding.

    Args:
        document: Number of the document of each token; windows on the first axis.
    """
    index = torch.arange(document.shape[1])
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values


def _fill(
    windows: TokenWindows, places: Sequence[tuple[int, int]], numbered: dict[int, RowTokens]
) -> TokenWindows:
    is_answer = torch.zeros_like(windows.input_ids, dtype=torch.bool)
    for (window, start), (number, row) in zip(places, numbered.items(), strict=True):
        place(windows, window, start, ids=row.ids, document=number)
        is_answer[window, start : start + len(row)] = row.is_answer
    return replace(windows, is_answer=is_answer)


def _tell(domain: str, cut: int, dropped: int, total: int) -> None:
    if cut:
        logger.warning(
            "domain %s: %d of %d rows have answers longer than data.sequence_length, which were "
            "cut at the end", domain, cut, total,
        )  # fmt: skip
    if dropped:
        logger.warning("domain %s: %d of %d rows have no answer, left out", domain, dropped, total)
