"""Keeping the splits apart."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_smoe.data.splits import SPLITS
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.errors import InputError
from tests.data.test_packing import CHECKPOINT

LONG = "A sentence that stands in more than one split. " * 5
OTHER = "Words of another kind, in one split alone. " * 5


def split_of(folder: Path, split: str, documents: list[str], name: str = "law.txt") -> None:
    (folder / split).mkdir(exist_ok=True)
    (folder / split / name).write_text("\x1e".join(documents))


def data(folder: Path | None, **options: Any) -> TextDataModule:
    return TextDataModule(tokenizer=CHECKPOINT, path=folder, sequence_length=16, **options)


def test_the_shipped_splits_share_nothing() -> None:
    data(None).check((*SPLITS, "valid"))


def test_a_document_of_two_splits_is_refused_where_both_are_used(tmp_path: Path) -> None:
    split_of(tmp_path, "train", ["short", LONG, OTHER])
    split_of(tmp_path, "calib", ["short", f"\n{LONG} "])
    split_of(tmp_path, "valid", ["short", OTHER[:-3]])
    text = data(tmp_path)
    for alone in (("train",), ("calib", "calib"), ("train", "valid"), ("calib", "valid")):
        text.check(alone)
    text.windows("calib")
    text.windows("train")
    message = (
        r"the train and calib text share 1 documents of 200 .* of domain 'law' and begins "
        r"'A sentence that stands .*' -> take them out .*data\.calib=hf://NAME@train\[:5%\]"
    )
    for splits in (("train", "calib"), ("train", "valid", "calib")):
        with pytest.raises(InputError, match=message):
            text.check(splits)


def test_rows_count_with_prompt_and_answer(tmp_path: Path) -> None:
    for split, row in (
        ("train", {"prompt": LONG, "completion": OTHER}),
        ("valid", {"input": LONG + OTHER, "output": ""}),
    ):
        split_of(tmp_path, split, [json.dumps(row)], "law.jsonl")
    with pytest.raises(InputError, match="the train and valid text share 1 documents"):
        data(tmp_path).check(("train", "valid"))


def test_one_file_for_two_splits_is_refused_however_short(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("short")
    (tmp_path / "link.txt").symlink_to(path)
    text = data(None, train=str(path), calib=str(tmp_path / "link.txt"))
    text.check(("train", "valid"))
    message = r"data\.train and data\.calib both read .*notes\.txt; a verb uses both -> give each"
    with pytest.raises(InputError, match=message):
        text.check(("train", "calib"))


def test_slices_of_a_dataset_are_told_by_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"{n} {OTHER}" for n in range(20)]})

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        # What the library does with a split, on rows in memory.
        instruction = datasets.ReadInstruction.from_spec(split)
        (part,) = instruction.to_absolute({"train": 20})
        return rows.select(range(part.from_ or 0, 20 if part.to is None else part.to))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data(None, train="hf://a/b@train[25%:]", calib="hf://a/b@train[:25%]").check(SPLITS)
    both = {"train": "hf://a/b", "calib": "hf://a/b@train[:25%]"}
    with pytest.raises(InputError, match="the train and calib text share 5 documents"):
        data(None, **both).check(SPLITS)
    with pytest.raises(InputError, match="both read hf://a/b@train"):
        data(None, train="hf://a/b", calib="hf://a/b").check(SPLITS)
