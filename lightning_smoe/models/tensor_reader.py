"""The tensors of a checkpoint folder, read one at a time without a model."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_smoe.errors import InputError
from lightning_smoe.models.folder import CheckpointFolder

# Of one tensor, what is looked at in one go.
_PIECE_BYTES = 64 << 20


class TensorReader:
    """The tensors of a folder by their keys, read one at a time; a context that holds its files.

    Args:
        folder: The folder.

    Raises:
        InputError: A file is no safetensors file.
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        self._stack = ExitStack()
        # Any: safetensors declares no type for what it opens.
        self._files: dict[Path, Any] = {}
        self.places: dict[str, Path] = {}
        self.twice: list[str] = []
        for shard in folder.shards:
            try:
                self._files[shard] = self._stack.enter_context(safe_open(shard, framework="pt"))
            except SafetensorError as error:
                raise InputError(f"{shard} is damaged ({error}); copy it again") from error
            keys: list[str] = self._files[shard].keys()
            for key in keys:
                if key in self.places:
                    self.twice.append(key)
                self.places[key] = shard

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def files(self) -> set[str]:
        """Names of the files."""
        return {shard.name for shard in self._files}

    def read(self, key: str) -> Tensor:
        """One tensor, whole."""
        tensor: Tensor = self._files[self.places[key]].get_tensor(key)
        return tensor

    def read_row(self, key: str, row: int) -> Tensor:
        """One row of a tensor along its first axis."""
        tensor: Tensor = self._files[self.places[key]].get_slice(key)[row]
        return tensor

    def pieces(self, key: str) -> Iterator[Tensor]:
        """One tensor in pieces of bounded size along its first axis."""
        part = self._files[self.places[key]].get_slice(key)
        shape = part.get_shape()
        if not shape or not shape[0]:
            yield self.read(key)
            return
        row = part[0:1]
        step = max(1, _PIECE_BYTES // max(1, row.numel() * row.element_size()))
        for start in range(0, shape[0], step):
            yield part[start : start + step]
