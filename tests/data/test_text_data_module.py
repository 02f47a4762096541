"""The data module on the shipped corpus and on a user's own text."""

import inspect
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_smoe.data.splits import CORPUS, SPLITS
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.errors import InputError
from tests.data.shipped_text import shipped, short_text

DOMAINS = ("arith", "bible", "docs", "facts", "js", "lit", "python", "spanish")

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture
def own_text(tmp_path: Path) -> Path:
    """Two domains in three of the splits: test is missing."""
    for split in ("train", "calib", "valid"):
        (tmp_path / split).mkdir()
        for domain in ("arith", "python"):
            shutil.copy(short_text() / split / f"{domain}.txt", tmp_path / split)
    return tmp_path


def test_the_shipped_corpus_is_the_default_and_gives_the_budget() -> None:
    default = inspect.signature(TextDataModule.__init__).parameters["path"].default
    data = shipped(path=default)
    data.check(SPLITS)
    assert data.domains_of("calib") == DOMAINS
    for split, tokens in (("calib", 1024), ("test", 512), ("valid", 256)):
        windows = data.windows(split)
        assert windows.num_tokens == tokens
        assert windows.input_ids.shape == (tokens // 32, 32)
        assert windows.domain_names == DOMAINS


def test_any_prefix_is_balanced_over_domains() -> None:
    domain = shipped().windows("calib").domain
    for size in range(1, len(domain) + 1):
        counts = domain[:size].bincount(minlength=len(DOMAINS))
        assert counts.max() - counts.min() <= 1


def test_every_domain_gives_one_window_at_least() -> None:
    windows = shipped(calib_tokens=32).windows("calib")
    assert windows.domain.tolist() == list(range(8))


def test_a_domain_that_has_less_than_its_share_gives_all_it_has(own_text: Path) -> None:
    (own_text / "calib/tiny.txt").write_text("one two three four five six seven " * 20)
    everything = shipped(path=own_text, calib_tokens=None).windows("calib")
    windows = shipped(path=own_text, calib_tokens=3 * 32 * 50).windows("calib")
    tiny = everything.domain.bincount()[2]
    assert windows.domain.bincount().tolist() == [50, 50, tiny]
    assert 0 < tiny < 50


def test_no_budget_takes_every_window_once() -> None:
    windows = shipped(valid_tokens=None).windows("valid")
    assert len(windows) > 8 * 100
    drawn = {tuple(row) for row in windows.input_ids.tolist()}
    assert len(drawn) > 0.99 * len(windows)


def test_the_same_seed_gives_the_same_windows() -> None:
    first, second = shipped(), shipped()
    assert first.fingerprint("calib") == second.fingerprint("calib")
    assert first.fingerprint("calib") != shipped(seed=43).fingerprint("calib")
    assert first.fingerprint("calib") != first.fingerprint("test")


def test_a_fingerprint_does_not_depend_on_batches_workers_or_budgets_of_other_splits() -> None:
    other = shipped(batch_size=3, num_workers=2, test_tokens=64, train_tokens=64)
    assert shipped().fingerprint("calib") == other.fingerprint("calib")


def test_windows_of_a_domain_do_not_depend_on_other_domains_or_on_the_budget() -> None:
    whole, alone = shipped().windows("calib"), shipped(domains=["python"]).windows("calib")
    of_python = whole.input_ids[whole.domain == DOMAINS.index("python")]
    assert alone.domain_names == ("python",)
    torch.testing.assert_close(alone.input_ids[: len(of_python)], of_python, rtol=0, atol=0)
    assert len(alone) == 8 * len(of_python)


def test_documents_are_numbered_through_a_split() -> None:
    windows = shipped(valid_tokens=None, pack=False).windows("valid")
    assert windows.document[:, 0].sort().values.tolist() == list(range(len(windows)))
    for domain in range(7):
        mine, following = (windows.document[windows.domain == d, 0] for d in (domain, domain + 1))
        assert mine.max() + 1 == following.min()


def test_unpacked_windows_hold_the_start_of_one_document_each() -> None:
    windows = shipped(pack=False, valid_tokens=None, sequence_length=4096).windows("valid")
    mask = windows.attention_mask.bool()
    assert not mask.all()
    assert (windows.document[~mask] == -1).all()
    assert all(
        len(row[kept].unique()) == 1 for row, kept in zip(windows.document, mask, strict=True)
    )


def write_txt(path: Path, documents: list[str]) -> None:
    path.with_suffix(".txt").write_text("\x1e".join(documents), "utf-8", newline="")


def write_jsonl(path: Path, documents: list[str]) -> None:
    lines = [json.dumps({"text": text}) for text in documents]
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def write_parquet(path: Path, documents: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path.with_suffix(".parquet"))


def write_folder(path: Path, documents: list[str]) -> None:
    path.mkdir()
    write_jsonl(path / "part-0", documents[:1])
    write_parquet(path / "part-1", documents[1:])


@pytest.mark.parametrize("write", [write_txt, write_jsonl, write_parquet, write_folder])
def test_every_format_gives_the_same_windows(
    tmp_path: Path, write: Callable[[Path, list[str]], None]
) -> None:
    for domain in DOMAINS:
        documents = (short_text() / "calib" / f"{domain}.txt").read_bytes().decode().split("\x1e")
        write(tmp_path / domain, documents)
    own = shipped(calib=str(tmp_path))
    assert own.fingerprint("calib") == shipped().fingerprint("calib")
    assert own.fingerprint("test") == shipped().fingerprint("test")


def test_setup_tokenises_what_the_stage_needs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_smoe.data.text")
    data = shipped(domains=["arith", "lit"], train_tokens=640)
    for stage, logged in {
        "predict": ["calib: 1024 tokens in 32 x 32 (arith 16, lit 16)"],
        "validate": ["valid: 256 tokens in 8 x 32 (arith 4, lit 4)"],
        "fit": ["train: 640 tokens in 20 x 32 (arith 10, lit 10)"],
        "test": ["test: 512 tokens in 16 x 32 (arith 8, lit 8)"],
    }.items():
        caplog.clear()
        data.setup(stage)
        assert caplog.messages == logged


def test_a_missing_split_is_named_with_the_option_that_gives_it(own_text: Path) -> None:
    shipped(path=own_text).check(["train", "calib", "valid"])
    message = r"has no sub-folder 'test' -> add it, or name the test text by data\.test"
    with pytest.raises(InputError, match=message):
        shipped(path=own_text).check(["train", "test"])
    shipped(path=own_text, test=str(own_text / "valid")).check(["train", "test"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": None}, r"data\.tokenizer is not set -> name the folder"),
        ({"tokenizer": "/none"}, r"data\.tokenizer=/none: no such folder"),
        ({"path": Path("/none")}, r"data\.path=/none: no such folder"),
        ({"calib": "/none.txt"}, r"/none\.txt: no such file or folder -> correct data\.calib"),
        ({"domains": ["lits"]}, r"names 'lits', which the calib .* did you mean 'lit'\?"),
        ({"sequence_length": 1}, r"data\.sequence_length=1 is too small -> set it to 2 or more"),
        ({"batch_size": 0}, r"data\.batch_size=0 is too small -> set it to 1 or more"),
        ({"num_workers": -1}, r"data\.num_workers=-1 is too small -> set it to 0 or more"),
        ({"calib_tokens": 31}, r"data\.calib_tokens=31 is less than one sequence of .*=32"),
    ],
)
def test_what_cannot_be_done_is_refused_before_tokenising(
    options: dict[str, Any], message: str
) -> None:
    data = shipped(**options)
    with pytest.raises(InputError, match=message):
        data.check(["calib"])
    with pytest.raises(InputError, match=message):
        data.windows("calib")


def test_unreadable_text_is_refused_before_tokenising(own_text: Path) -> None:
    (own_text / "calib/python.txt").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"python\.txt: not UTF-8 at byte offset 3"):
        shipped(path=own_text).check(["calib"])
    (own_text / "calib/python.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"python\.txt: holds no text"):
        shipped(path=own_text).check(["calib"])


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match="no split 'tset' -> use one of train, calib, valid, test"):
        shipped().check(["tset"])


def test_the_command_line_explains_every_option() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(TextDataModule, "data")
    words = ["--data.domains", "[lit, js]", "--data.domain_weights", "{lit: 1, js: 2.5}"]
    options = parser.parse_args(["--data.path", str(CORPUS), *words])
    data = TextDataModule(**options.data.as_dict())
    assert data.domains_of("calib") == ("js", "lit")
    assert data.domain_weights == {"lit": 1, "js": 2.5}
    help_text = " ".join(parser.format_help().split())
    documentation = inspect.getdoc(TextDataModule) or ""
    for name in inspect.signature(TextDataModule.__init__).parameters.keys() - {"self"}:
        assert f"--data.{name}" in help_text
        assert f"\n    {name}: " in documentation
