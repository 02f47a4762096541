"""A folder is checked to be whole before any work is spent on it."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from lightning_smoe.errors import InputError
from lightning_smoe.models.folder import open_checkpoint
from tests.conftest import SHIPPED_CHECKPOINT
from tests.families import build
from tests.models.pruning import store_tensors, stored_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Damage = Callable[[Path], object]


@pytest.fixture
def checkpoint(saved_checkpoint: Callable[[str], Path]) -> Path:
    return saved_checkpoint("qwen3_moe")


@pytest.fixture
def sharded(checkpoint: Path) -> Path:
    """The same weights in several files."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / WEIGHTS).unlink()
    model.save_pretrained(checkpoint, max_shard_size="400KB")
    return checkpoint


def weights_are(content: bytes) -> Damage:
    return lambda folder: (folder / WEIGHTS).write_bytes(content)


def header_is(header: Any) -> Damage:
    text = json.dumps(header).encode()
    return weights_are(struct.pack("<Q", len(text)) + text)


def cut(num_bytes: int) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[:-num_bytes])

    return damage


def text_is(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def index_is(index: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def config_has(**fields: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


NOT_SAFETENSORS = r"(?s)model\.safetensors is not a safetensors file \(.*\); copy it again"
DAMAGED = {
    "the last bytes are missing": (
        cut(10),
        r"model\.safetensors is truncated or damaged: it has \d+ bytes where its header says \d+",
    ),
    "bytes are added": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"x"),
        "truncated or damaged",
    ),
    "the header is cut": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:99]),
        NOT_SAFETENSORS,
    ),
    "the file is empty": (weights_are(b""), NOT_SAFETENSORS),
    "noise": (weights_are(b"\xff" * 1000), NOT_SAFETENSORS),
    "a pointer of git-lfs": (
        weights_are(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"),
        NOT_SAFETENSORS,
    ),
    "the header is no object": (header_is([]), NOT_SAFETENSORS),
    "an entry is no object": (header_is({"a": "b"}), NOT_SAFETENSORS),
    "an entry lies nowhere": (header_is({"a": {"dtype": "F32"}}), NOT_SAFETENSORS),
    "an entry lies at null": (header_is({"a": {"data_offsets": None}}), NOT_SAFETENSORS),
    "no configuration": (
        lambda folder: (folder / "config.json").unlink(),
        r"qwen3_moe is not a checkpoint: it has no config\.json",
    ),
    "the configuration is no JSON": (
        text_is("config.json", "{'a': 1}"),
        r"config\.json is not JSON \(.*\); copy the file again",
    ),
    "the configuration is no text": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"),
        r"config\.json is not JSON \(.*\); copy the file again",
    ),
    "the configuration is no object": (
        text_is("config.json", "[1]"),
        r"config\.json is not a JSON object; copy the file again",
    ),
    "pickled weights": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        r"has no model\.safetensors and no model\.safetensors\.index\.json; only safetensors .*"
        "save the model once with transformers' save_pretrained",
    ),
    "quantised weights": (
        config_has(quantization_config={"quant_method": "gptq"}),
        r"qwen3_moe is quantised; compress the original weights, then quantise again \(gptq is not",
    ),
    "the index is no JSON": (
        lambda folder: (folder / WEIGHTS).rename(folder / INDEX),
        r"index\.json is not JSON",
    ),
    "the index names no files": (
        index_is({"metadata": {}}),
        r"index\.json has no weight_map; copy the file again",
    ),
    "the index is a list of files": (
        index_is({"weight_map": ["model.safetensors"]}),
        r"index\.json has no weight_map; copy the file again",
    ),
    "the index names a file that is missing": (
        index_is({"weight_map": {"a": "model-00001-of-00002.safetensors"}}),
        r"00002\.safetensors, named in model\.safetensors\.index\.json, is not there",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_unsupported_folder_is_refused(
    checkpoint: Path, damage: Damage, message: str
) -> None:
    open_checkpoint(checkpoint)
    damage(checkpoint)
    with pytest.raises(InputError, match=message):
        open_checkpoint(checkpoint)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shards = open_checkpoint(sharded).shards
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises(InputError, match=rf"{shards[1]}, named in .*copy the checkpoint again"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("place", ["missing", "./missing", "../missing", "a--b/c", "runs/a..b"])
def test_a_folder_that_is_not_there_is_refused(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"there is no (checkpoint )?folder {place}[;,]"):
        open_checkpoint(place)


def test_a_file_is_no_folder(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="there is no checkpoint folder"):
        open_checkpoint(checkpoint / "config.json")


def test_a_name_of_the_hub_is_refused_without_network_when_it_is_not_in_the_cache() -> None:
    message = (
        "there is no folder no-one/no-such-model, and the Hugging Face hub did not give no-one/"
    )
    with pytest.raises(InputError, match=message):
        open_checkpoint("no-one/no-such-model")


def test_a_folder_is_found_below_the_home_folder(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert open_checkpoint("~/qwen3_moe").path == checkpoint


def test_a_configuration_that_says_it_is_not_quantised_is_read(checkpoint: Path) -> None:
    config_has(quantization_config=None)(checkpoint)
    assert open_checkpoint(checkpoint).config["quantization_config"] is None


def test_the_header_tells_type_shape_and_size_of_every_tensor(checkpoint: Path) -> None:
    folder = open_checkpoint(checkpoint)
    tensors = stored_tensors(checkpoint)
    assert {key: entry["shape"] for key, entry in folder.tensors.items()} == {
        key: list(tensor.shape) for key, tensor in tensors.items()
    }
    assert {entry["dtype"] for entry in folder.tensors.values()} == {"F32"}
    assert folder.num_bytes == (checkpoint / WEIGHTS).stat().st_size


def test_shards_are_read_as_one(checkpoint: Path, sharded: Path) -> None:
    whole = build("qwen3_moe", vocab_size=4096).state_dict()
    folder = open_checkpoint(sharded)
    assert len(folder.shards) > 1
    assert sum(t.numel() for t in whole.values()) == sum(
        t.numel() for t in stored_tensors(sharded).values()
    )
    assert folder.tensors.keys() == stored_tensors(sharded).keys()
    assert folder.num_bytes == sum(shard.stat().st_size for shard in folder.shards)


def test_everything_but_weights_configuration_and_card_is_copied_along(checkpoint: Path) -> None:
    kept = ["LICENSE", "chat_template.jinja", "merges.txt", "special_tokens_map.json"]
    left = ["README.md", "smoe.json", ".gitattributes", "pytorch_model.bin", "model.gguf"]
    left.append("modeling_smoe.py")
    for name in (*kept, *left):
        (checkpoint / name).write_text("{}")
    (checkpoint / "onnx").mkdir()
    expected = {*kept, "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in open_checkpoint(checkpoint).other_files} == expected


def test_the_fingerprint_follows_weights_and_configuration_alone(checkpoint: Path) -> None:
    def fingerprint() -> str:
        return open_checkpoint(checkpoint).fingerprint

    before = fingerprint()
    (checkpoint / "README.md").write_text("A card.")
    assert fingerprint() == before
    assert open_checkpoint(checkpoint.rename(checkpoint.with_name("moved"))).fingerprint == before
    shutil.move(checkpoint.with_name("moved"), checkpoint)
    config_has(rms_norm_eps=0.5)(checkpoint)
    changed = fingerprint()
    tensors = stored_tensors(checkpoint)
    tensors["model.norm.weight"][3] += 1
    store_tensors(checkpoint, tensors)
    assert len({before, changed, fingerprint()}) == 3


def test_the_shipped_checkpoint_is_whole() -> None:
    folder = open_checkpoint(SHIPPED_CHECKPOINT)
    assert folder.config["num_experts"] == 60
    assert not folder.manifest
    assert not folder.experts_per_layer
