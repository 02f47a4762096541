"""Weights that are stored in 4 or 8 bits with scales, and what they are in bfloat16.

For checkpoints that were published so only: DeepSeek's and Qwen's float8 with a scale for each
block of a matrix, and the micro-scaled 4-bit experts of GPT-OSS. No GPU and no kernel is needed.
transformers reads both, too, but cuts a matrix into equal blocks, also where the last one is small.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lightning_smoe.errors import InputError

Entries = dict[str, dict[str, Any]]

_FLOAT8 = "F8_E4M3"
_SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
# The sixteen numbers of 4 bits (E2M1), sign first; OCP Microscaling Formats, table 5.
_FOUR_BITS: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Exponents are stored as bytes without sign.
_EXPONENT_BIAS = 127


class Quantisation(ABC):
    """How the weights of a checkpoint are stored, and how they are read.

    Attributes:
        method: Its name in config.json.
    """

    method: ClassVar[str]

    @abstractmethod
    def parts_of(self, key: str, entries: Mapping[str, Any]) -> tuple[str, ...]:
        """The stored tensors of which a quantised one is made; none for one stored as it is.

        Args:
            key: Name that the tensor has in an unquantised checkpoint.
            entries: What the files hold.
        """

    @abstractmethod
    def plain(self, entries: Entries) -> Entries:
        """What the files would hold if nothing were quantised: keys, types and sizes.

        Raises:
            InputError: A quantised tensor lacks its scales.
        """

    @abstractmethod
    def dequantise(self, values: Tensor, scales: Tensor) -> Float[Tensor, "..."]:
        """The tensor in bfloat16."""


@dataclass(frozen=True)
class BlockFloat8(Quantisation):
    """Float8 (E4M3) matrices with a scale for each block, as DeepSeek-V3 is published.

    Args:
        block: Rows and columns of a block; none where a matrix has one scale.
    """

    method: ClassVar[str] = "fp8"
    block: tuple[int, int] | None

    def parts_of(self, key: str, entries: Mapping[str, Any]) -> tuple[str, ...]:
        """The matrix and its scales."""
        return (key, key + _SCALE) if key + _SCALE in entries else ()

    def plain(self, entries: Entries) -> Entries:
        """The same keys, without those of scales."""
        for key, entry in entries.items():
            scale = entries.get(key + _SCALE, {"dtype": "nothing"})["dtype"]
            if entry["dtype"] == _FLOAT8 and scale not in _SCALE_TYPES:
                raise InputError(
                    f"{key} is stored in 8 bits, and its scales, {key + _SCALE}, in {scale}, which "
                    "is not read; compress the original weights, then quantise again"
                )
        return {
            key: {**entry, "dtype": "BF16"} if entry["dtype"] == _FLOAT8 else entry
            for key, entry in entries.items()
            if not (key.endswith(_SCALE) and key.removesuffix(_SCALE) in entries)
        }

    def dequantise(
        self, values: Float[Tensor, "... rows columns"], scales: Float[Tensor, "..."]
    ) -> Float[Tensor, "... rows columns"]:
        """Every number times the scale of its block; blocks at the edge may be cut."""
        if self.block is None:
            return (values.float() * scales.float().reshape(-1)).bfloat16()
        rows, columns = values.shape[-2:]
        spread = scales.float()
        for axis, size in zip((-2, -1), self.block, strict=True):
            spread = spread.repeat_interleave(size, dim=axis)
        return (values.float() * spread[..., :rows, :columns]).bfloat16()


@dataclass(frozen=True)
class MicroscaledFloat4(Quantisation):
    """Numbers of 4 bits, 32 of which share an exponent, as the experts of GPT-OSS are published.

    (Open Compute Project, Microscaling Formats, MXFP4.) Input and output axis are swapped in the
    unquantised model.
    """

    method: ClassVar[str] = "mxfp4"

    def parts_of(self, key: str, entries: Mapping[str, Any]) -> tuple[str, ...]:
        """The packed numbers and their exponents."""
        return (key + _BLOCKS, key + _SCALES) if key + _BLOCKS in entries else ()

    def plain(self, entries: Entries) -> Entries:
        """One key in the place of two."""
        found: Entries = {}
        for key, entry in entries.items():
            name = key.removesuffix(_BLOCKS)
            if key.endswith(_SCALES) and key.removesuffix(_SCALES) + _BLOCKS in entries:
                continue
            if name != key and name + _SCALES not in entries:
                raise InputError(f"{key} has no {name + _SCALES} beside it; copy the file again")
            found[name] = entry
            if name != key:
                *experts, rows, groups, size = entry["shape"]
                shape = [*experts, 2 * groups * size, rows]
                found[name] = {**entry, "dtype": "BF16", "shape": shape}
        return found

    def dequantise(
        self,
        values: UInt8[Tensor, "experts rows groups bytes"],
        scales: UInt8[Tensor, "experts rows groups"],
    ) -> Float[Tensor, "experts columns rows"]:
        """Each number times two to its group's exponent."""
        table = torch.tensor([*_FOUR_BITS, *(-number for number in _FOUR_BITS)])
        count, rows, groups, size = values.shape
        found = torch.empty(count, 2 * groups * size, rows, dtype=torch.bfloat16)
        # One expert at a time: numbers of 4 bits grow eightfold on the way.
        for place, packed, exponents in zip(found, values, scales, strict=True):
            # The low half of a byte comes first.
            numbers = torch.stack(
                [table[(packed & 15).int()], table[(packed >> 4).int()]], dim=-1
            ).flatten(-2)
            scaled = torch.ldexp(numbers, exponents.int()[..., None] - _EXPONENT_BIAS)
            place.copy_(scaled.flatten(-2).T)
        return found


def quantisation_of(config: Mapping[str, Any], place: object) -> Quantisation | None:
    """How a checkpoint is quantised, from its config.json; none if it is not.

    Args:
        config: The content of config.json.
        place: Where it lies, for a person.

    Raises:
        InputError: It is quantised in a way that is not read.
    """
    found = config.get("quantization_config")
    if not found:
        return None
    settings: dict[str, Any] = found if isinstance(found, dict) else {}
    method = settings.get("quant_method")
    if method == "mxfp4":
        return MicroscaledFloat4()
    # Scales of activations, and experts in 4 bits, are stored under other names.
    is_plain = settings.get("activation_scheme", "dynamic") == "dynamic"
    if method == "fp8" and is_plain and settings.get("expert_dtype", "fp8") == "fp8":
        block = settings.get("weight_block_size", (128, 128))
        if block is None:
            return BlockFloat8(None)
        if isinstance(block, list | tuple) and [type(size) for size in block] == [int, int]:
            return BlockFloat8((block[0], block[1]))
    raise InputError(
        f"{place} is quantised; compress the original weights, then quantise again "
        f"({method or 'what it names'} is not read, fp8 with a scale a block and mxfp4 are)"
    )
