"""Places to run the command line in: a fresh experiment, and one that `fit` has finished."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

if TYPE_CHECKING:
    from tests.cli.command import Workplace

CORPUS = Path(__file__).parents[2] / "lightning_smoe" / "data" / "corpus"
SPLITS = ("train", "calib", "valid", "test")
DOMAINS = ("arith", "lit")
CHARACTERS = 8000


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the shipped text of two domains, not to be changed by tests."""
    folder = tmp_path_factory.mktemp("text")
    for split in SPLITS:
        (folder / split).mkdir()
        for domain in DOMAINS:
            whole = (CORPUS / split / f"{domain}.txt").read_text(encoding="utf-8")
            (folder / split / f"{domain}.txt").write_text(whole[:CHARACTERS], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def new_workplace(
    built_checkpoint: Callable[[str], Path], text: Path
) -> Callable[[Path, str], "Workplace"]:
    """Fills a folder with a family's checkpoint, text and an experiment file."""
    # Imported here: see tests/conftest.py.
    from tests.cli.command import Workplace

    def fill(folder: Path, family: str) -> Workplace:
        shutil.copytree(built_checkpoint(family), folder / "model")
        shutil.copytree(text, folder / "text")
        work = Workplace(folder)
        work.write({})
        return work

    return fill


@pytest.fixture
def work(new_workplace: Callable[[Path, str], "Workplace"], tmp_path: Path) -> "Workplace":
    """A fresh experiment on a Qwen2-MoE: twelve experts in layers 0 and 2, layer 1 dense."""
    return new_workplace(tmp_path / "work", "qwen2_moe")


@pytest.fixture(scope="session")
def finished_once(
    new_workplace: Callable[[Path, str], "Workplace"], tmp_path_factory: pytest.TempPathFactory
) -> "Workplace":
    """The same after `fit`, with TensorBoard's files; not to be changed by tests."""
    work = new_workplace(tmp_path_factory.mktemp("finished") / "work", "qwen2_moe")
    outcome = work.done("fit", "--trainer.logger", "true")
    (work.folder / "fit.out").write_text(outcome.out)
    (work.folder / "fit.err").write_text(outcome.err)
    return work


@pytest.fixture
def finished(finished_once: "Workplace", tmp_path: Path) -> "Workplace":
    """A copy of the finished experiment."""
    shutil.copytree(finished_once.folder, tmp_path / "finished")
    return type(finished_once)(tmp_path / "finished")


@pytest.fixture
def untrained(finished: "Workplace") -> "Workplace":
    """The finished experiment with its training and its report taken away."""
    shutil.rmtree(finished.folder / "logs")
    for name in ("recovered", "training"):
        shutil.rmtree(finished.out / name)
    for name in ("report.json", "report.md"):
        (finished.out / name).unlink()
    return finished


@pytest.fixture(scope="session")
def dense(text: Path, built_checkpoint: Callable[[str], Path]) -> Path:
    """A checkpoint without experts, not to be changed by tests."""
    folder = text.parent / "dense"
    shutil.copytree(built_checkpoint("qwen2_moe"), folder)
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
