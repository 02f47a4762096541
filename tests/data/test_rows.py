"""Rows of a prompt with its answer, in files and by their fields."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lightning_smoe.data.reading import read_documents
from lightning_smoe.data.rows import Chat, Completion, Document, text_of
from lightning_smoe.errors import InputError

MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a ", "completion": "b", "id": 1}, Completion("a ", "b")),
        ({"input": "a ", "output": "b"}, Completion("a ", "b")),
        ({"messages": MESSAGES, "prompt": "2+2?"}, Chat(tuple(MESSAGES))),
        ({"text": "a", "prompt": "b"}, "a"),
    ],
)
def test_rows_are_told_by_their_fields(
    tmp_path: Path, row: dict[str, Any], expected: Document
) -> None:
    assert read_documents(write_jsonl(tmp_path / "a.jsonl", [row]), "text") == [expected]
    table = pyarrow.Table.from_pylist([row])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet", "text") == [expected]


def test_text_of_a_row_is_all_that_is_said() -> None:
    assert [text_of(d) for d in ("a", Completion("b ", "c"), Chat(tuple(MESSAGES)))] == [
        "a",
        "b c",
        "2+2?\n4",
    ]


def test_text_beside_an_answer_needs_a_word(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "t", "prompt": "p", "completion": "c"}])
    with pytest.raises(InputError, match=r"has 'text' and also prompt, completion -> set data\.f"):
        read_documents(path, "text")
    assert read_documents(path, "text", "text") == ["t"]
    assert read_documents(path, "text", "rows") == [Completion("p", "c")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "a"}, r"has no field 'text'.*to one of: body; rows have messages; or prompt, c"),
        ({"instruction": "x", "input": "a", "output": "b"}, "has 'instruction' beside input, out"),
        ({"prompt": "a", "completion": None}, "field 'completion' is a NoneType, not text"),
        ({"prompt": MESSAGES, "completion": "4"}, "field 'prompt' is a list, not text"),
        ({"messages": []}, "'messages' is no list of messages -> write"),
        ({"messages": [{"role": "user"}]}, "message 1 has no text in 'role' and 'content'"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_documents(write_jsonl(tmp_path / "a.jsonl", [row]), "text")


def test_rows_asked_for_must_be_there(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match=r"line 1: has no answer -> .*rows have messages"):
        read_documents(path, "text", "rows")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"a\.txt: holds text, not rows -> set data\.format"):
        read_documents(tmp_path / "a.txt", "text", "rows")
