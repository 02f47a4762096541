"""Checkpoints on disk: whole or absent, the one before kept until the next is there."""

import os
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_smoe.errors import InputError
from lightning_smoe.models.artifact import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the one it replaces, and renames it once it is on the disk.

    Lightning's own builds the whole file in memory, writes it under /tmp and copies it over the
    one before: a kill or a full disk in between loses both. Here tensors go to a sibling file one
    by one, which is removed when it fails, and by the next save when the process was killed.
    Only local folders; what is loaded is data, never code.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any = None,
    ) -> None:
        """Replaces `path` by the checkpoint; on failure `path` is what it was before.

        Raises:
            OSError: It could not be written, such as on a full disk.
            ValueError: Storage options are given.
        """
        if storage_options is not None:
            raise ValueError("storage_options are for remote folders; checkpoints are kept locally")
        target = Path(path)
        with replacing(target) as partial:
            _write(checkpoint, partial, target)
        # The new name, too, must survive a loss of power.
        _sync(target.parent)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a checkpoint without running code from it, whatever `weights_only` says.

        Raises:
            FileNotFoundError: There is none.
            InputError: It is damaged, or holds more than tensors, numbers and text.
        """
        del weights_only
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except (EOFError, RuntimeError, UnpicklingError) as error:
            raise InputError(
                f"{path} is no whole checkpoint of tensors and numbers ({_first_line(error)}); "
                "resume from another, or start afresh"
            ) from error


def _write(checkpoint: dict[str, Any], partial: Path, target: Path) -> None:
    with partial.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            # torch reports its own confusion about positions in the file instead of the cause.
            cause = error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(
                cause.errno, f"{cause.strerror}; the checkpoint before it is kept", str(target)
            ) from error
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
