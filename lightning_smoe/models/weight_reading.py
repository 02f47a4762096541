"""Weights read from their files straight into the places that they have in a model.

transformers maps the files, copies every expert out of them, and stacks the copies: three times the
memory of a layer, and more time than the reading. Here each expert's bytes go where they belong.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lightning_smoe.models.folder import CheckpointFolder
from lightning_smoe.models.stored import TORCH_TYPES

_TYPES = {**TORCH_TYPES, "I64": torch.int64}
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of a safetensors file.

    Args:
        file: The file.
        start: Its first byte.
        dtype: Its type.
        shape: Its sizes.
    """

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """A copy in memory."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor)
        return tensor

    def read_into(self, place: Tensor) -> None:
        """Copies it into a tensor of its shape, which may be of another type."""
        if place.dtype != self.dtype or not place.is_contiguous():
            place.copy_(self.read())
            return
        # Not mapped: pages of a mapped file count as this process's memory until it ends.
        # Any: numpy's arrays are not declared as the buffers that they are.
        numbers: Any = place.reshape(-1).view(torch.uint8).numpy()
        rest = memoryview(numbers)
        with self.file.open("rb", buffering=0) as file:
            start = self.start
            while rest:
                count = os.preadv(file.fileno(), [rest], start)
                if count == 0:
                    raise EOFError(f"{self.file} ends in the middle of a tensor")
                start, rest = start + count, rest[count:]


@dataclass(frozen=True, eq=False)
class FusedWeight:
    """A tensor of a model that its files hold in parts: one matrix an expert, gate apart from up.

    Args:
        shape: Its sizes.
        dtype: Its type in memory.
        parts: What goes side by side along `axis`: for each, the tensors along the first axis.
        axis: Axis of the whole along which parts lie side by side.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[StoredWeight, ...], ...]
    axis: int

    def __getitem__(self, _: EllipsisType) -> Tensor:
        """Reads it; transformers asks so for what it has not loaded yet."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(whole)
        return whole

    def read_into(self, whole: Tensor) -> None:
        """Copies it into a tensor of its shape.

        Over a tensor that was there already this takes a third of the time: the system has to
        clear new memory before a process gets it.
        """
        start = 0
        for part in self.parts:
            size = part[0].shape[self.axis - 1]
            for place, stored in zip(whole.narrow(self.axis, start, size), part, strict=True):
                stored.read_into(place)
            start += size

    @property
    def is_whole(self) -> bool:
        """Whether the parts fill it."""
        if len({len(part) for part in self.parts} | {self.shape[0]}) > 1:
            return False
        rest = [s for axis, s in enumerate(self.shape) if axis not in (0, self.axis)]
        alike = all(
            len({stored.shape for stored in part}) == 1
            and len(part[0].shape) == len(self.shape) - 1
            and [s for axis, s in enumerate(part[0].shape, 1) if axis != self.axis] == rest
            for part in self.parts
        )
        return (
            alike and sum(p[0].shape[self.axis - 1] for p in self.parts) == (self.shape[self.axis])
        )


@dataclass(frozen=True, eq=False)
class PlainWeight:
    """A tensor of a model that its files hold as it is.

    Args:
        stored: Where it lies.
    """

    stored: StoredWeight

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.stored.shape

    def __getitem__(self, _: EllipsisType) -> Tensor:
        """Reads it; transformers asks so for what it has not loaded yet."""
        return self.stored.read()

    def read_into(self, whole: Tensor) -> None:
        """Copies it into a tensor of its shape."""
        self.stored.read_into(whole)


Weights = dict[str, FusedWeight | PlainWeight]


def readable_weights(
    folder: CheckpointFolder, model: PreTrainedModel, dtype: torch.dtype
) -> tuple[Weights, list[Any]] | None:
    """What transformers can load in the place of a folder's files: all weights, not yet read.

    Args:
        folder: The folder.
        model: Its model on the meta device.
        dtype: Type of the weights in memory.

    Returns:
        The weights, by their names in the model, and transformers' rules for storing them again;
        none where a weight is no plain stack of what is stored, or does not fit: transformers
        knows more rules, and says what is wrong.
    """
    stored = stored_weights(folder)
    if stored is None or model._get_dtype_plan(dtype):
        return None
    rules: list[Any] = get_model_conversion_mapping(model)
    converters = {p: r for r in rules if isinstance(r, WeightConverter) for p in r.source_patterns}
    own = model.state_dict()
    weights: Weights = {}
    parts: dict[str, dict[str, list[StoredWeight]]] = {}
    for key, (name, pattern) in _named(stored, rules, model, own).items():
        if pattern is not None:
            parts.setdefault(name, {}).setdefault(pattern, []).append(stored[key])
        else:
            weights[name] = PlainWeight(stored[key])
    for name, found in parts.items():
        rule = converters[next(iter(found))]
        fused = _fused(rule, own.get(name), found, dtype)
        if fused is None:
            return None
        weights[name] = fused
    return weights, [rule for rule in rules if rule.was_used()]


def stored_weights(folder: CheckpointFolder) -> dict[str, StoredWeight] | None:
    """Every tensor of a folder's files by its key; none if one is of a type that is not read."""
    found: dict[str, StoredWeight] = {}
    for shard in folder.shards:
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        if not {entry["dtype"] for entry in header.values()} <= _TYPES.keys():
            return None
        for key, entry in header.items():
            start, end = entry["data_offsets"]
            dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
            if end - start != math.prod(shape) * dtype.itemsize:
                return None
            found[key] = StoredWeight(shard, _LENGTH_BYTES + length + start, dtype, shape)
    return found


def _named(
    stored: Mapping[str, StoredWeight],
    rules: list[Any],
    model: PreTrainedModel,
    own: dict[str, Tensor],
) -> dict[str, tuple[str, str | None]]:
    """Name in the model of each stored tensor, and the pattern of the rule that fuses it."""
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    named = {}
    for key in sorted(stored, key=dot_natural_key):
        found = rename_source_key(key, renamings, converters, prefix, own)
        if found[0] not in own and key in own:
            found = rename_source_key(key, [], [], prefix, own)
        named[key] = found
    return named


def _fused(
    rule: Any,
    own: Tensor | None,
    found: Mapping[str, list[StoredWeight]],
    dtype: torch.dtype,
) -> FusedWeight | None:
    """The tensor that a rule makes of stored ones; none if it is no plain stack."""
    stack, *beside = rule.operations
    if own is None or not isinstance(stack, MergeModulelist) or stack.dim != 0:
        return None
    if len(beside) > 1 or not all(isinstance(step, Concatenate) for step in beside):
        return None
    if not own.is_floating_point() or len(rule.target_patterns) > 1:
        return None
    parts = tuple(tuple(found[p]) for p in rule.source_patterns if p in found)
    axis = beside[0].dim if beside else 1
    fused = FusedWeight(tuple(own.shape), dtype, parts, axis)
    return fused if len(parts) == len(rule.source_patterns) and fused.is_whole else None
