"""Rows as windows."""

import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lightning_smoe.data.packing import load_tokenizer
from lightning_smoe.data.row_packing import first_fit, positions_of, shorten, window_rows
from lightning_smoe.data.row_tokens import RowTokens, tokenize_rows
from lightning_smoe.data.rows import Completion
from lightning_smoe.errors import InputError
from tests.data.test_packing import CHECKPOINT

ROWS = [Completion(f"Sort {n} 3 1: " * (1 + n % 3), f"1 3 {n}") for n in range(9)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(CHECKPOINT)


def row(marks: str) -> RowTokens:
    """Tokens numbered from 0, a for an answer."""
    return RowTokens(torch.arange(len(marks)), torch.tensor([mark == "a" for mark in marks]))


@pytest.mark.parametrize("pack", [True, False])
def test_every_row_stands_whole_in_one_window(
    tokenizer: PreTrainedTokenizerBase, pack: bool
) -> None:
    windows = window_rows(ROWS, tokenizer, 64, domain="a", first_document=5, pack=pack)
    assert windows.is_answer is not None
    assert windows.isolated == pack
    assert len(windows) < len(ROWS) if pack else len(windows) == len(ROWS)
    for number, tokens in enumerate(tokenize_rows(ROWS, tokenizer), 5):
        here = windows.document == number
        assert here.any(1).sum() == 1
        torch.testing.assert_close(windows.input_ids[here], tokens.ids)
        torch.testing.assert_close(windows.is_answer[here], tokens.is_answer)
        assert windows.attention_mask[here].all()
        if windows.position_ids is not None:
            assert windows.position_ids[here].tolist() == [*range(len(tokens))]
    padding = windows.document == -1
    assert not windows.attention_mask[padding].any()
    assert not windows.is_answer[padding].any()


def test_every_token_but_the_first_is_learned_where_asked(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    windows = window_rows(ROWS, tokenizer, 64, domain="a", answers_only=False)
    assert windows.is_answer is not None
    assert windows.position_ids is not None
    expected = windows.attention_mask.bool() & (windows.position_ids > 0)
    assert torch.equal(windows.is_answer, expected)


def test_fingerprints_tell_answers_and_isolation(tokenizer: PreTrainedTokenizerBase) -> None:
    options: list[dict[str, Any]] = [{}, {"answers_only": False}, {"pack": False}]
    made = [window_rows(ROWS[:1], tokenizer, 64, domain="a", **chosen) for chosen in options]
    assert torch.equal(made[0].input_ids, made[2].input_ids)
    assert len({windows.fingerprint() for windows in made}) == 3


@pytest.mark.parametrize(
    ("marks", "length", "kept"),
    [
        ("pppaa", 5, [0, 1, 2, 3, 4]),
        ("pppaapp", 6, [0, 1, 2, 3, 4, 5]),
        ("pppaapp", 4, [1, 2, 3, 4]),
        ("pppaa", 3, [2, 3, 4]),
        ("pppaaaa", 3, [2, 3, 4]),
        ("aaaa", 3, [0, 1, 2]),
        ("paapppaa", 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_long_row_loses_its_answer_last(marks: str, length: int, kept: list[int]) -> None:
    assert shorten(row(marks), length).ids.tolist() == kept


def test_rows_go_to_the_first_window_with_room() -> None:
    assert first_fit([5, 4, 3, 3, 8, 2], 8) == [(0, 0), (1, 0), (0, 5), (1, 4), (2, 0), (3, 0)]
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 9, (200,), generator=generator).tolist()
    rooms: list[int] = []
    expected = []
    for length in lengths:
        window = next((w for w, room in enumerate(rooms) if room >= length), len(rooms))
        if window == len(rooms):
            rooms.append(8)
        expected.append((window, 8 - rooms[window]))
        rooms[window] -= length
    assert first_fit(lengths, 8) == expected


def test_positions_start_anew_with_each_document_and_at_padding() -> None:
    document = torch.tensor([[4, 4, 5, 6, 6, -1, -1], [7, 7, 7, 7, 7, 7, 7]])
    assert positions_of(document).tolist() == [[0, 1, 0, 0, 1, 0, 1], [*range(7)]]


def test_what_is_lost_is_said_in_one_line(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*ROWS, Completion("why?", "one two three " * 19), Completion("why?", "")]
    windows = window_rows(rows, tokenizer, 32, domain="law")
    assert caplog.messages == [
        "domain law: 1 of 11 rows have answers longer than data.sequence_length, which were cut "
        "at the end",
        "domain law: 1 of 11 rows have no answer, left out",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert windows.document.max() == 9


def test_rows_without_any_answer_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="no row of domain 'law' has an answer -> add rows"):
        window_rows([Completion("why?", "")], tokenizer, 32, domain="law")
