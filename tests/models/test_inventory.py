"""What is wrong with the files of a folder is found and named, without loading the model."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_smoe.models import tensor_reader
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.inventory import (
    Check,
    check_finite,
    check_hashes,
    check_index,
    check_tensors,
)
from lightning_smoe.models.tensor_reader import TensorReader
from tests.models.pruning import store_tensors, stored_tensors
from tests.models.sharing import save_shared

NORM = "model.norm.weight"
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, Tensor]


@pytest.fixture
def checkpoint(saved_checkpoint: Callable[[str], Path]) -> Path:
    return saved_checkpoint("qwen3_moe")


@pytest.fixture
def sharded(checkpoint: Path) -> Path:
    """The same weights in several files."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="400KB")
    return checkpoint


def look(folder: Path) -> dict[str, Check]:
    """All that is found, by what was looked at."""
    opened = open_checkpoint(folder)
    with TensorReader(opened) as stored:
        checks = [
            check_tensors(opened),
            check_index(opened, stored),
            check_hashes(opened, lambda _: None),
            check_finite(stored, lambda _: None),
        ]
    return {check.name: check for check in checks}


def wrong(folder: Path) -> list[str]:
    return [line for check in look(folder).values() for line in check.wrong]


def change(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    tensors = stored_tensors(folder)
    edit(tensors)
    store_tensors(folder, tensors)


def note_hashes(folder: Path) -> None:
    files = [p for p in sorted(folder.iterdir()) if p.name != "smoe.json"]
    noted = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (folder / "smoe.json").write_text(json.dumps({"schema": 1, "files": noted}))


def test_nothing_is_wrong_with_any_family(
    family: str, built_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = built_checkpoint(family)
    save_shared(source, tmp_path / "shared")
    for folder in (source, tmp_path / "shared"):
        assert not wrong(folder)
        count = len(stored_tensors(folder))
        assert look(folder)["tensors"].says == f"{count} of {count} that are needed"


DAMAGE: dict[str, tuple[Callable[[Tensors], Any], list[str]]] = {
    "missing": (lambda t: t.pop(EXPERT), [f"{EXPERT} is missing"]),
    "another shape": (
        lambda t: t.update({ROUTER: t[ROUTER][:8].clone()}),
        [f"{ROUTER} has shape [8, 32] where the configuration needs [12, 32]"],
    ),
    "another kind": (
        lambda t: t.update({NORM: t[NORM].to(torch.int64)}),
        [f"{NORM} is of type I64 where the model has torch.float32"],
    ),
    "unknown": (
        lambda t: t.update({"model.extra.weight": t[NORM].clone()}),
        ["model.extra.weight is not known to the configuration"],
    ),
    "not a number": (
        lambda t: t[EXPERT].view(-1)[5:7].fill_(torch.nan),
        [f"{EXPERT} holds 2 NaN and 0 infinite numbers"],
    ),
    "infinite": (
        lambda t: t[NORM].view(-1)[3:4].fill_(-torch.inf),
        [f"{NORM} holds 0 NaN and 1 infinite numbers"],
    ),
}


@pytest.mark.parametrize(("edit", "found"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_tensor_is_named(
    checkpoint: Path, edit: Callable[[Tensors], Any], found: list[str]
) -> None:
    change(checkpoint, edit)
    assert wrong(checkpoint) == found


def test_a_configuration_that_lies_about_the_count_is_found(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    field = next(f for f in ("num_experts", "num_local_experts") if f in config)
    path.write_text(json.dumps(config | {field: 16}))
    found = wrong(checkpoint)
    assert f"{ROUTER} has shape [12, 32] where the configuration needs [16, 32]" in found
    assert "model.layers.0.mlp.experts.12.up_proj.weight is missing" in found


def test_tensors_of_what_predicts_ahead_are_counted_and_not_wrong(checkpoint: Path) -> None:
    ahead = ["model.layers.3.mlp.gate.weight", "mtp.norm.weight"]
    change(checkpoint, lambda t: t.update({key: t[NORM].clone() for key in ahead}))
    assert not wrong(checkpoint)
    assert "2 more predict several tokens ahead (MTP)" in look(checkpoint)["tensors"].says


def test_a_tensor_that_is_tied_need_not_be_stored(checkpoint: Path) -> None:
    change(checkpoint, lambda t: t.pop("lm_head.weight"))
    assert wrong(checkpoint) == ["lm_head.weight is missing"]
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    assert not wrong(checkpoint)


def test_weights_under_the_names_of_modules_are_known(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(checkpoint, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in stored_tensors(checkpoint)
    assert not wrong(checkpoint)


def test_an_index_that_disagrees_with_its_files_is_found(sharded: Path) -> None:
    assert not wrong(sharded)
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    first, second = files[0], files[1]
    moved = next(k for k, v in index["weight_map"].items() if v == first)
    lost = next(k for k, v in index["weight_map"].items() if v == second)
    index["weight_map"] |= {moved: second, "model.extra.weight": first}
    del index["weight_map"][lost]
    (sharded / INDEX).write_text(json.dumps(index))
    (sharded / "old.safetensors").write_bytes((sharded / first).read_bytes())
    assert set(wrong(sharded)) == {
        f"{moved} is in {first} where {INDEX} names {second}",
        f"model.extra.weight is not in {first}, where {INDEX} has it",
        f"{lost} of {second} is not in {INDEX}",
    }
    assert "old.safetensors not used" in look(sharded)["index"].says


def test_a_flipped_bit_and_a_missing_file_are_found_by_their_hash(checkpoint: Path) -> None:
    assert "none are noted" in look(checkpoint)["hashes"].says
    note_hashes(checkpoint)
    assert not wrong(checkpoint)
    assert look(checkpoint)["hashes"].says == "5 of 5 files"
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    (checkpoint / "tokenizer.json").unlink()
    assert wrong(checkpoint) == [
        "model.safetensors is not the file that was written: its hash is another",
        "tokenizer.json is not there",
    ]


def test_numbers_are_looked_at_in_pieces(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_reader, "_PIECE_BYTES", 1 << 13)
    seen: list[int] = []
    folder = open_checkpoint(checkpoint)
    with TensorReader(folder) as stored:
        assert not check_finite(stored, seen.append).wrong
    tensors = stored_tensors(checkpoint).values()
    assert sum(seen) == sum(t.numel() * t.element_size() for t in tensors)
    assert len(seen) > len(tensors)
    change(checkpoint, lambda t: t[EXPERT].view(-1)[-1:].fill_(torch.nan))
    assert wrong(checkpoint) == [f"{EXPERT} holds 1 NaN and 0 infinite numbers"]
