"""Weight files as they are known before any weight is: which tensor lies where."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

MAX_SHARD_SIZE = 5_000_000_000  # bytes, as transformers 4 split

# In the order in which safetensors places them within a file: none is then out of its alignment.
_TYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_ORDER = list(_TYPES)
_HEADER_UNIT = 8  # bytes; safetensors pads with spaces


@dataclass(frozen=True)
class StoredTensor:
    """What a file says of a tensor.

    Args:
        dtype: Its type, as safetensors names it.
        shape: Its sizes.
    """

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _TYPES:
            raise ValueError(f"no weights of type {self.dtype} are written; one of {_ORDER}")

    @staticmethod
    def of(tensor: Tensor) -> "StoredTensor":
        """What a file will say of this tensor, which may be on the meta device."""
        return StoredTensor(_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))

    @property
    def num_bytes(self) -> int:
        """Its size on disk, in bytes."""
        return math.prod(self.shape) * _TYPES[self.dtype].itemsize


@dataclass(frozen=True, eq=False)
class Shard:
    """One weight file before it is written.

    Args:
        name: What it is called.
        tensors: What lies in it, by key, in the order of its bytes.
    """

    name: str
    tensors: Mapping[str, StoredTensor]

    @cached_property
    def header(self) -> bytes:
        """The first bytes of the file, byte for byte as safetensors writes them."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for key, tensor in self.tensors.items():
            place = [start, start + tensor.num_bytes]
            entries[key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": place}
            start = place[1]
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _HEADER_UNIT)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def places(self) -> dict[str, int]:
        """Where in the file each tensor begins, in bytes."""
        places, start = {}, len(self.header)
        for key, tensor in self.tensors.items():
            places[key] = start
            start += tensor.num_bytes
        return places

    @property
    def num_bytes(self) -> int:
        """Length of the file, in bytes."""
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors.values())


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """Which tensor lies in which weight file, and where.

    Args:
        shards: The files, in the order of what they hold.
    """

    shards: tuple[Shard, ...]

    @staticmethod
    def of(tensors: Mapping[str, StoredTensor], max_bytes: int = MAX_SHARD_SIZE) -> "ShardLayout":
        """Shares tensors out to files so that those of a decoder layer lie together.

        Args:
            tensors: Everything to store, by key.
            max_bytes: Weights in one file at most, in bytes; a larger tensor has one to itself.

        Raises:
            ValueError: The limit is not positive.
        """
        if max_bytes <= 0:
            raise ValueError(f"a shard of {max_bytes} bytes holds nothing; allow more")
        groups: list[dict[str, StoredTensor]] = [{}]
        free = max_bytes
        for key in sorted(tensors, key=_natural):
            size = tensors[key].num_bytes
            if size > free and groups[-1]:
                groups.append({})
                free = max_bytes
            groups[-1][key] = tensors[key]
            free -= size
        count = len(groups)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        shards = (Shard(n, _placed(group)) for n, group in zip(names, groups, strict=True))
        return ShardLayout(tuple(shards))

    @cached_property
    def shard_of(self) -> dict[str, Shard]:
        """The file of each tensor, by key."""
        return {key: shard for shard in self.shards for key in shard.tensors}

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Everything stored, by key."""
        return {key: tensor for shard in self.shards for key, tensor in shard.tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def index(self) -> str | None:
        """The text that says which file holds what; none for a single file."""
        if len(self.shards) == 1:
            return None
        size = sum(tensor.num_bytes for tensor in self.tensors.values())
        files = {key: shard.name for key, shard in self.shard_of.items()}
        value = {"metadata": {"total_size": size}, "weight_map": files}
        return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _natural(key: str) -> list[tuple[int, str]]:
    # Every second part is a number, so that like is compared with like.
    parts = re.split(r"(\d+)", key)
    return [(int(part), "") if place % 2 else (0, part) for place, part in enumerate(parts)]


def _placed(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {k: tensors[k] for k in sorted(tensors, key=lambda k: (_rank(tensors[k]), k))}


def _rank(tensor: StoredTensor) -> int:
    return _ORDER.index(tensor.dtype)
