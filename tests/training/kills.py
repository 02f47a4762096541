"""Processes that train, and what kills them."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_smoe.training import checkpoint_io

FORK = multiprocessing.get_context("fork")
# Looser than any run takes, so that a hang ends as a failure.
TIMEOUT = 120


def start(work: Callable[[], object]) -> ForkProcess:
    """Starts a process of its own that does the work; nothing is imported anew."""
    process = FORK.Process(target=work)
    process.start()
    return process


def finish(processes: Sequence[ForkProcess]) -> list[int | None]:
    """Waits for processes; the exit code of each."""
    for process in processes:
        process.join(TIMEOUT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


class Kill(Callback):
    """Kills its process as a batch starts, which leaves it no time to do anything."""

    def __init__(self, batch: int) -> None:
        self._batch = batch

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.total_batch_idx == self._batch:
            os.kill(os.getpid(), signal.SIGKILL)


class KillWriting(Callback):
    """Kills its process within the n-th write of a checkpoint, half the bytes written."""

    def __init__(self, number: int) -> None:
        self._left = number

    def on_save_checkpoint(self, *_: Any) -> None:
        self._left -= 1
        if self._left == 0:
            setattr(checkpoint_io, "_write", self._write_half)  # noqa: B010  # no other signature

    @staticmethod
    def _write_half(checkpoint: dict[str, Any], partial: Path, _: Path) -> None:
        torch.save(checkpoint, partial)
        os.truncate(partial, partial.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
