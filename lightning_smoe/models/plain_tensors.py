"""The tensors of a checkpoint's files, read when they are asked for, as if never quantised."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lightning_smoe.models.folder import CheckpointFolder


@dataclass(frozen=True, eq=False)
class Dequantised:
    """A tensor that is put together of its stored parts when it is asked for.

    Args:
        make: Reads the parts and puts them together.
    """

    make: Callable[[], Tensor]

    def __getitem__(self, _: EllipsisType) -> Tensor:
        """The tensor; transformers asks so for what it has not loaded yet."""
        return self.make()


@contextmanager
def plain_tensors(folder: CheckpointFolder) -> Iterator[Callable[[str], Any]]:
    """Opens a folder's files while it is held; gives what `tensor[...]` reads, by its key.

    Args:
        folder: The folder; its `tensors` name the keys.
    """
    with ExitStack() as stack:
        files: dict[Path, Any] = {}

        def stored(key: str) -> Any:
            shard = folder.shard_of(key)
            if shard not in files:
                # Any: safetensors declares no type for what it opens.
                opened: Any = safe_open(shard, "pt")
                files[shard] = stack.enter_context(opened)
            return files[shard].get_slice(key)

        def tensor(key: str) -> Any:
            found = folder.quantisation
            parts = () if found is None else found.parts_of(key, folder.stored_tensors)
            if found is None or not parts:
                return stored(key)
            return Dequantised(lambda: found.dequantise(*(stored(part)[...] for part in parts)))

        yield tensor
