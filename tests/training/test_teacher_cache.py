"""A cache of answers knows what it was made from, how large it is, and when it is damaged."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_smoe.errors import InputError
from lightning_smoe.training.cache_plan import TeacherCache, planned_cache
from lightning_smoe.training.teacher import CachedTeacher
from lightning_smoe.training.teacher_cache import CacheFolder
from lightning_smoe.training.teacher_shards import AnswerFormat
from tests.training.caches import contents, fill, plan, text
from tests.training.students import CHECKPOINT, VOCAB_SIZE


@pytest.fixture
def filled(tmp_path: Path) -> CacheFolder:
    cache = plan(tmp_path / "teacher", text(), top_k=5)
    fill(cache, text())
    return cache


@pytest.mark.parametrize(
    ("top_k", "precision", "expected"),
    [
        (64, "float32", 64 * (4 + 4) + 4),
        (64, "float16", 64 * (4 + 2) + 2),
        (4096, "float32", 4096 * 4),
    ],
)
def test_the_bytes_of_a_token_are_counted(top_k: int, precision: Any, expected: int) -> None:
    assert AnswerFormat(4096, top_k, precision).bytes_per_token == expected


def test_the_size_is_said_before_and_is_that_of_the_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    cache = plan(tmp_path / "teacher", text(), top_k=5)
    told = cache.bytes_to_come()
    fill(cache, text())
    each = 5 * (4 + 4) + 4
    # 12 windows of 16 tokens, the last of which has no next one.
    assert cache.num_tokens == {"train": 8 * 15, "valid": 4 * 15}
    assert f"180 distributions of {each} bytes (the 5 likeliest, float32), 0.0 MB" in caplog.text
    assert json.loads((cache.path / "manifest.json").read_text())["bytes_per_token"] == each
    shards = [path for path in cache.path.iterdir() if path.suffix == ".safetensors"]
    headers = 1000 * len(shards)
    assert told <= sum(path.stat().st_size for path in shards) + headers <= told + 2 * headers


def test_files_hold_about_64_megabytes() -> None:
    options: dict[str, Any] = {"teacher": "", "vocab_size": VOCAB_SIZE, "numbers": ""}
    cache = planned_cache(Path("nowhere"), text(), TeacherCache(top_k=64), **options)
    size = cache.windows_per_shard * 16 * (64 * 8 + 4)
    assert size == pytest.approx(64 * 2**20, rel=0.01)


def test_what_is_kept_is_checked() -> None:
    with pytest.raises(ValueError, match="top_k=0 must be 1 or more"):
        TeacherCache(top_k=0)
    with pytest.raises(ValueError, match=r"temperature=0\.0 must be above 0"):
        TeacherCache(temperature=0.0)


def test_other_text_tokenizer_and_packing_are_other_answers(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, tokenizer)

    def changed(**options: Any) -> set[str]:
        inputs = plan(tmp_path, text(**options)).manifest.inputs
        return {key for key in inputs if inputs[key] != before[key]}

    before = plan(tmp_path, text()).manifest.inputs
    # The configuration beside it says nothing of tokens, and is rewritten by some programs.
    with (tokenizer / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    assert changed(tokenizer=tokenizer) == set()
    with (tokenizer / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert changed(tokenizer=tokenizer) == {"tokenizer"}
    assert changed(valid_tokens=64, train_tokens=64) == {"train text"}
    assert changed(sequence_length=32) == {"packing", "train text", "valid text"}


def test_answers_that_are_there_are_kept_and_others_refused(filled: CacheFolder) -> None:
    assert filled.is_complete()
    before = {path: path.stat().st_mtime_ns for path in filled.path.iterdir()}
    fill(filled, text())
    assert {path: path.stat().st_mtime_ns for path in filled.path.iterdir()} == before
    other = plan(filled.path, text(), top_k=6)
    with pytest.raises(InputError, match=r"different: top_k.*model\.overwrite"):
        fill(other, text())
    fill(other, text(), overwrite=True)
    assert other.is_complete()
    assert not other.is_complete(overwrite=True)
    CachedTeacher(other.path, other.manifest)


def test_a_missing_file_is_named_and_alone_made_again(filled: CacheFolder) -> None:
    before = contents(filled.path)
    (filled.path / "train-00000004.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks 1 files, such as train-00000004\.safetensors"):
        CachedTeacher(filled.path, filled.manifest)
    kept = (filled.path / "train-00000000.safetensors").stat().st_mtime_ns
    fill(filled, text())
    assert contents(filled.path) == before
    assert (filled.path / "train-00000000.safetensors").stat().st_mtime_ns == kept


def test_a_file_that_is_cut_short_counts_as_missing(filled: CacheFolder) -> None:
    before = contents(filled.path)
    path = filled.path / "valid-00000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"lacks 1 files, such as valid-00000000"):
        CachedTeacher(filled.path, filled.manifest)
    fill(filled, text())
    assert contents(filled.path) == before


def test_a_changed_byte_is_found(filled: CacheFolder) -> None:
    path = filled.path / "train-00000000.safetensors"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    match = re.escape(f"{path} is damaged (its content has changed); delete it and run")
    with pytest.raises(InputError, match=match):
        CachedTeacher(filled.path, filled.manifest)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"manifest": null}'])
def test_a_damaged_description_is_refused(filled: CacheFolder, content: str) -> None:
    (filled.path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        CacheFolder.read(filled.path)


def test_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no answers of the teacher; run"):
        CacheFolder.read(tmp_path)


def test_nothing_is_written_on_a_disk_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = plan(tmp_path / "teacher", text(), top_k=5)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"teacher needs 0\.00 GB"):
        fill(cache, text())
    assert not cache.path.exists()
    assert torch.is_grad_enabled()
