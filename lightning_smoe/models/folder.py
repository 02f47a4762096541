"""A checkpoint folder as it lies on disk, read without loading a weight."""

import json
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_smoe.errors import InputError
from lightning_smoe.models.artifact import Manifest, sha256_of, sha256_of_file
from lightning_smoe.models.hub import fetch
from lightning_smoe.models.modeling_smoe import TYPE_PREFIX
from lightning_smoe.models.quantised import Quantisation, quantisation_of

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)$")
_REWRITTEN = (
    "config.json",
    "model.safetensors.index.json",
    "modeling_smoe.py",
    "README.md",
    "smoe.json",
)
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
MANIFEST = "smoe.json"


@dataclass(frozen=True)
class CheckpointFolder:
    """A Hugging Face checkpoint folder with safetensors weights, checked to be whole.

    Args:
        path: The folder.
        name: What it is called: that of the folder, or of the model on the hub.
    """

    path: Path
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.path.resolve().name)

    @cached_property
    def _stored_config(self) -> dict[str, Any]:
        return _read_json(self.path / "config.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json, but for what says how the weights are quantised."""
        stored = self._stored_config
        return {k: v for k, v in stored.items() if k != "quantization_config" or not v}

    @cached_property
    def quantisation(self) -> Quantisation | None:
        """How the weights are quantised; none if they are not."""
        return quantisation_of(self._stored_config, self.path)

    @property
    def model_type(self) -> str:
        """The family, as config.json names it."""
        return str(self.config.get("model_type"))

    @property
    def is_mapped(self) -> bool:
        """Whether several router rows may share an expert."""
        return self.model_type.startswith(TYPE_PREFIX)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of smoe.json; empty for a folder that this project did not write."""
        path = self.path / MANIFEST
        found = _read_json(path) if path.exists() else {}
        try:
            counts = {int(k): int(v) for k, v in found.get("experts_per_layer", {}).items()}
            Manifest.from_json(found.get("manifest"))
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is damaged ({error}); copy or make the folder again"
            ) from error
        if any(index < 0 or count < 1 for index, count in counts.items()):
            raise InputError(f"{path} names layers without experts; copy or make the folder again")
        return found

    @property
    def experts_per_layer(self) -> dict[int, int]:
        """Routed experts of those decoder layers whose count differs from config.json's."""
        return {int(k): int(v) for k, v in self.manifest.get("experts_per_layer", {}).items()}

    @cached_property
    def shards(self) -> list[Path]:
        """The files that hold the weights."""
        if (self.path / _SINGLE).exists():
            return [self.path / _SINGLE]
        files = _read_json(self.path / _INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise InputError(f"{self.path / _INDEX} has no weight_map; copy the file again")
        return [self.path / name for name in sorted(set(files.values()))]

    @cached_property
    def stored_tensors(self) -> dict[str, dict[str, Any]]:
        """Type, shape and place of every tensor of the files, by key."""
        return {k: v for shard in self.shards for k, v in _header(shard).items()}

    @cached_property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """Type and shape of every tensor, by key, as they are when nothing is quantised."""
        found = self.quantisation
        return self.stored_tensors if found is None else found.plain(self.stored_tensors)

    @cached_property
    def _shard_of(self) -> dict[str, Path]:
        return {key: shard for shard in self.shards for key in _header(shard)}

    def shard_of(self, key: str) -> Path:
        """The file that holds a tensor."""
        return self._shard_of[key]

    @property
    def num_bytes(self) -> int:
        """Size of the weight files, in bytes."""
        return sum(shard.stat().st_size for shard in self.shards)

    @property
    def other_files(self) -> list[Path]:
        """Tokenizer, generation settings and whatever else lies beside the weights."""
        there = sorted(p for p in self.path.iterdir() if p.is_file() and p.name[0] != ".")
        return [p for p in there if p.name not in _REWRITTEN and not _WEIGHTS.match(p.name)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the configuration and of every byte of the weights.

        Raises:
            InputError: A weight file has another hash than was noted when it was written.
        """
        hashes = {shard.name: sha256_of_file(shard) for shard in self.shards}
        files = self.manifest.get("files")
        noted = files if isinstance(files, dict) else {}
        for name, digest in hashes.items():
            if noted.get(name, digest) != digest:
                raise InputError(
                    f"{self.path / name} is not as it was written: its hash is another; copy the "
                    "folder again, or run the step again with model.overwrite=true"
                )
        return sha256_of([self.config, *hashes.values()])


def open_checkpoint(checkpoint: str | Path) -> CheckpointFolder:
    """Finds a checkpoint folder, or fetches it from the hub, and checks that it is whole.

    Args:
        checkpoint: A folder, or `organisation/name` on the hub (fetched into the usual cache; this
            could not be tried where the project is built, which has no network).

    Raises:
        InputError: There is no such folder, or its files are missing, truncated or not supported.
    """
    path, name = Path(checkpoint).expanduser(), ""
    if not path.exists() and _HUB_NAME.fullmatch(str(checkpoint)):
        path, name = fetch(str(checkpoint)), str(checkpoint)
    if not path.is_dir():
        raise InputError(
            f"there is no checkpoint folder {checkpoint}; name a folder with config.json and "
            "safetensors weights, or organisation/name on the Hugging Face hub"
        )
    folder = CheckpointFolder(path, name)
    if not (path / "config.json").exists():
        raise InputError(f"{path} is not a checkpoint: it has no config.json")
    if not (path / _SINGLE).exists() and not (path / _INDEX).exists():
        raise InputError(
            f"{path} has no {_SINGLE} and no {_INDEX}; only safetensors weights are read: "
            "save the model once with transformers' save_pretrained"
        )
    quantisation = folder.quantisation
    for shard in folder.shards:
        _check_whole(shard)
    if quantisation is not None:
        quantisation.plain(folder.stored_tensors)
    _check_depth(folder)
    return folder


def _check_depth(folder: CheckpointFolder) -> None:
    """Refuses a number of layers that the weights cannot fill, before each is built in vain."""
    config, inner = folder.config, folder.config.get("text_config")
    for fields in (config, inner if isinstance(inner, dict) else {}):
        layers = fields.get("num_hidden_layers")
        if isinstance(layers, int) and layers > len(folder.tensors):
            raise InputError(
                f"{folder.path}/config.json says num_hidden_layers={layers}, and the weights are "
                f"{len(folder.tensors)} tensors; copy the checkpoint again"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object; copy the file again")
    return value


def _header(shard: Path) -> dict[str, dict[str, Any]]:
    with shard.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    return {k: v for k, v in header.items() if k != "__metadata__"}


# What reading a header raises where the file holds something else.
_NO_HEADER = (
    AttributeError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
    struct.error,
)


def _check_whole(shard: Path) -> None:
    if not shard.exists():
        raise InputError(f"{shard}, named in {_INDEX}, is not there; copy the checkpoint again")
    try:
        header = _header(shard)
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        ends = [int(tensor["data_offsets"][1]) for tensor in header.values()]
    except _NO_HEADER as error:
        raise InputError(f"{shard} is not a safetensors file ({error}); copy it again") from error
    expected, found = 8 + length + max(ends, default=0), shard.stat().st_size
    if expected != found:
        raise InputError(
            f"{shard} is truncated or damaged: it has {found} bytes where its header says "
            f"{expected}; copy it again"
        )
