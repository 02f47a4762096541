"""Putting weights into their places in files whose layout is known, in any order."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_smoe.models.shards import Shard, ShardLayout, StoredTensor

INDEX = "model.safetensors.index.json"
# What a file system says that cannot reserve blocks.
_NO_RESERVING = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class ShardWriter:
    """Puts tensors into their places in the weight files of a folder, in any order.

    Files that are there already with the same layout are gone on with, so that a run that was
    killed need not write again what it had written; those of another layout are removed.

    Args:
        folder: Where the files lie; it is made if it is not there.
        layout: What lies where.

    Raises:
        OSError: No space is left on the disk.
    """

    def __init__(self, folder: Path, layout: ShardLayout) -> None:
        self.folder = folder
        self.layout = layout
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {shard.name for shard in layout.shards}
        for file in folder.glob("model*.safetensors*"):
            if file.name not in wanted:
                file.unlink()
        for shard in layout.shards:
            if not _is_begun(folder / shard.name, shard):
                _begin(folder / shard.name, shard)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes some of the tensors, each in the type and shape that the layout gives it.

        Raises:
            ValueError: The layout has no such tensor, or another type or shape for it.
        """
        for key, tensor in tensors.items():
            self._check(key, tensor)
        for shard in self.layout.shards:
            keys = tensors.keys() & shard.tensors.keys()
            if keys:
                with (self.folder / shard.name).open("r+b", buffering=0) as file:
                    for key in sorted(keys, key=shard.places.__getitem__):
                        _write_at(file.fileno(), shard.places[key], tensors[key])

    def _check(self, key: str, tensor: Tensor) -> None:
        if key not in self.layout.shard_of:
            raise ValueError(f"{key} has no place in the files of {self.folder}")
        wanted = self.layout.shard_of[key].tensors[key]
        found = StoredTensor.of(tensor)
        if found != wanted:
            raise ValueError(
                f"{key} is {found.dtype} of shape {found.shape} where {self.folder} has a place "
                f"for {wanted.dtype} of shape {wanted.shape}"
            )

    def finish(self) -> None:
        """Writes the index, if there are several files, and waits until all is on the disk."""
        files = [self.folder / shard.name for shard in self.layout.shards]
        if self.layout.index is not None:
            (self.folder / INDEX).write_text(self.layout.index, "utf-8")
            files.append(self.folder / INDEX)
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _is_begun(path: Path, shard: Shard) -> bool:
    if not path.is_file() or path.stat().st_size != shard.num_bytes:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header


def _begin(path: Path, shard: Shard) -> None:
    with path.open("wb") as file:
        # Space that is reserved now is not found missing after hours of work.
        try:
            os.posix_fallocate(file.fileno(), 0, shard.num_bytes)
        except OSError as error:
            if error.errno not in _NO_RESERVING:
                raise
            file.truncate(shard.num_bytes)
        file.write(shard.header)


def _write_at(descriptor: int, start: int, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    left = memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's stubs for Python < 3.12
    while left:
        # The system writes 2 GB at most in one call.
        written = os.pwrite(descriptor, left, start)
        left, start = left[written:], start + written
