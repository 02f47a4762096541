"""Reading files and datasets as documents."""

import json
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lightning_smoe.data.reading import read_documents
from lightning_smoe.data.sources import HubText
from lightning_smoe.errors import InputError

DOCUMENTS = ["first\nwith two lines", "second \u2028 \x85 odd breaks", "tercero, según"]


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_documents_of_all_formats_are_the_same(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("\x1e".join(DOCUMENTS), "utf-8", newline="")
    rows: list[object] = [{"id": 1, "body": d} for d in [*DOCUMENTS, "  "]]
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    table = write_parquet(tmp_path / "a.parquet", {"body": list(DOCUMENTS), "id": [1, 2, 3]})
    for source in (text, lines, table):
        assert read_documents(source, "body") == DOCUMENTS


def test_a_text_file_without_separator_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert read_documents(path, "text") == ["one\r\n\r\ntwo\n"]


def test_rows_of_a_hub_dataset_are_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.extend([name, config, split])
        return datasets.Dataset.from_dict({"text": DOCUMENTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_documents(HubText("a/c4", "en", "train"), "text") == DOCUMENTS
    assert asked == ["a/c4", "en", "train"]
    with pytest.raises(InputError, match=r"hf://a/c4:en@train: has no field 'body'.*: text"):
        read_documents(HubText("a/c4", "en", "train"), "body")


def test_a_hub_dataset_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"hf://a/c4@train: cannot be loaded \(offline\) -> corr"):
        read_documents(HubText("a/c4", None, "train"), "text")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_of_white_space_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(" \n\x1e\n" if name == "a.txt" else "\n \n")
    with pytest.raises(InputError, match="holds no text -> fill it"):
        read_documents(tmp_path / name, "text")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_other_encodings_are_refused_with_the_byte(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("según".encode("latin1"))
    with pytest.raises(InputError, match=re.escape(f"{name}: not UTF-8 at byte offset 3 -> conv")):
        read_documents(tmp_path / name, "text")


def test_a_missing_field_is_refused_with_those_there_are(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"body": "b", "id": 1}])
    with pytest.raises(InputError, match=r"line 2: has no field 'text'.*one of: body, id"):
        read_documents(lines, "text")
    table = write_parquet(tmp_path / "a.parquet", {"body": ["b"], "id": [1]})
    with pytest.raises(InputError, match=r"a\.parquet: has no field 'text'.*one of: body, id"):
        read_documents(table, "text")


def test_a_field_that_is_no_text_is_refused(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", [{"text": 3}])
    with pytest.raises(InputError, match=r"line 1: field 'text' is a int, not text"):
        read_documents(lines, "text")
    table = write_parquet(tmp_path / "a.parquet", {"text": ["b", None]})
    with pytest.raises(InputError, match=r"row 2: field 'text' is a NoneType, not text"):
        read_documents(table, "text")


@pytest.mark.parametrize(("line", "complaint"), [("{'a'", "not JSON"), ("[1]", "a list")])
def test_lines_that_are_no_json_objects_are_refused(
    tmp_path: Path, line: str, complaint: str
) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(InputError, match=f"line 2: {complaint}.* -> write one object a line"):
        read_documents(tmp_path / "a.jsonl", "text")


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(InputError, match=r"a\.parquet: not a readable parquet file"):
        read_documents(tmp_path / "a.parquet", "text")
