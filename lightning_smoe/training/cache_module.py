"""The teacher answers all of the training and the held-out text, under Lightning's predict loop."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_smoe.data.positions import counted_positions
from lightning_smoe.data.samplers import PaddedSampler, WindowDataset
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.errors import InputError
from lightning_smoe.functional.chunked import chunk_size_of, chunks
from lightning_smoe.functional.targets import TeacherTokens, TopTokens
from lightning_smoe.training.teacher import LiveTeacher
from lightning_smoe.training.teacher_cache import CacheFolder
from lightning_smoe.training.teacher_shards import Answers, Shard

logger = logging.getLogger(__name__)


def write_cache(
    trainer: Trainer,
    teacher: LiveTeacher,
    data: TextDataModule,
    cache: CacheFolder,
    *,
    overwrite: bool = False,
) -> None:
    """Fills a cache; files that are there already, of a run that was cut off, stay as they are.

    Args:
        trainer: Runs the loop, on one process or several: each makes files of its own.
        teacher: Who answers.
        data: The text.
        cache: What is to be made, and where.
        overwrite: Replace what is there, if it is complete or of another experiment.

    Raises:
        InputError: The folder holds other answers and `overwrite` is not set, or the model has
            another vocabulary than was planned.
        OSError: The answers do not fit on the disk; none was made.
    """
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        cache.prepare(overwrite)
    trainer.strategy.barrier()
    # Before any process writes, so that all agree on what is missing.
    missing = cache.missing()
    trainer.strategy.barrier()
    if not missing:
        return
    there = sum(len(cache.shards(split)) for split in cache.num_windows) - len(missing)
    logger.info("cache: %s; %d files to make, %d there", cache.describe(), len(missing), there)
    trainer.predict(CacheModule(teacher, data, cache, missing), return_predictions=False)
    trainer.strategy.barrier()


class CacheModule(LightningModule):
    """Asks a teacher, and keeps the answers of one file at a time in memory.

    Args:
        teacher: Who answers; no sub-module.
        data: The text.
        cache: What is to be made, and where.
        missing: The files that are to be made.
    """

    def __init__(
        self,
        teacher: LiveTeacher,
        data: TextDataModule,
        cache: CacheFolder,
        missing: Sequence[Shard],
    ) -> None:
        super().__init__()
        self._teacher, self._data, self._cache = teacher, data, cache
        self._missing = missing
        self._open: _OpenShard | None = None

    def setup(self, stage: str) -> None:
        """Brings the teacher to the device."""
        self._teacher.place(self.trainer.strategy.root_device)

    def teardown(self, stage: str) -> None:
        """Takes the teacher off the device."""
        self._teacher.place(torch.device("cpu"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Loads the windows of this process's files, one file after the other."""
        replicas = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        dataset = _ShardBatches(
            self._data, self._missing, self._data.batch_size, replicas["num_replicas"]
        )
        sampler = PaddedSampler(dataset, **replicas)
        return DataLoader(
            dataset, batch_size=None, sampler=sampler, num_workers=self._data.num_workers
        )

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Asks the teacher, and writes the file whose last window it was."""
        shard = self._missing[int(batch["shard"])]
        counted = counted_positions(batch)
        # Also for windows that only fill up: processes that share the model run it together.
        answer = self._teacher.answer(batch, counted, shard.split, layers=False)
        if not bool(batch["valid"].all()):
            return {}
        if self._open is None:
            self._open = _OpenShard(shard, self._cache, counted.shape[1])
        kept, temperature = self._cache.format, self._cache.temperature_of(shard.split)
        for rows in chunks(int(counted.sum()), chunk_size_of(kept.vocab_size)):
            top = answer.tokens(rows).top(kept.top_k, temperature)
            self._open.add(top, temperature)
        if self._open.is_full_with(counted.cpu()):
            self._open.write()
            self._open = None
        return {}


class _OpenShard:
    """The answers of one file while they are gathered."""

    def __init__(self, shard: Shard, cache: CacheFolder, sequence_length: int) -> None:
        self._shard, self._cache, kept = shard, cache, cache.format
        most = shard.num_windows * sequence_length
        self._log_probs = torch.empty(most, kept.num_columns, dtype=kept.dtype)
        self._indices = torch.empty(most, 0 if kept.is_whole else kept.top_k, dtype=torch.int32)
        self._counted: list[Tensor] = []
        self._num_tokens = 0

    def add(self, tokens: TeacherTokens, temperature: float) -> None:
        known = tokens.log_probs(temperature)
        kept = self._cache.format
        if known.shape[-1] != kept.num_columns:
            raise InputError(
                f"the teacher's head has another vocabulary than the {kept.vocab_size} tokens that "
                "its config.json names; correct vocab_size there"
            )
        rows = slice(self._num_tokens, self._num_tokens + len(known))
        self._log_probs[rows] = known
        if isinstance(tokens, TopTokens):
            self._indices[rows] = tokens.indices.int()
        self._num_tokens = rows.stop

    def is_full_with(self, counted: Tensor) -> bool:
        """Notes which positions were added, and says whether that was the last batch."""
        self._counted.append(counted)
        return sum(map(len, self._counted)) == self._shard.num_windows

    def write(self) -> None:
        rows = slice(0, self._num_tokens)
        indices = None if self._cache.format.is_whole else self._indices[rows]
        self._shard.write(
            self._cache.path,
            Answers(self._log_probs[rows], indices),
            torch.cat(self._counted),
            self._cache.manifest.digest,
        )


@dataclass(frozen=True)
class _Step:
    """Windows of a missing file that are asked together."""

    shard: int
    windows: range
    is_real: bool


class _ShardBatches(Dataset[dict[str, Tensor]]):
    """Batches of missing files, so ordered that a process which takes every n-th has whole files.

    No batch spans two files, so that neither the number of processes nor what was there before
    decides which windows are asked together. All processes have equally many batches; what fills
    up is not valid.
    """

    def __init__(
        self, data: TextDataModule, missing: Sequence[Shard], batch_size: int, num_processes: int
    ) -> None:
        splits = {shard.split for shard in missing}
        self._windows = {split: WindowDataset(data.windows(split)) for split in splits}
        self._missing = missing
        steps = [
            [
                _Step(i, range(start, min(start + batch_size, end)), True)
                for i in range(rank, len(missing), num_processes)
                for end in [missing[i].first + missing[i].num_windows]
                for start in range(missing[i].first, end, batch_size)
            ]
            for rank in range(num_processes)
        ]
        first = steps[0][0]
        filling = _Step(first.shard, first.windows, False)
        self._steps = [s for turn in zip_longest(*steps, fillvalue=filling) for s in turn]

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, item: tuple[int, bool]) -> dict[str, Tensor]:
        step = self._steps[item[0]]
        dataset = self._windows[self._missing[step.shard].split]
        rows = [dataset[window, step.is_real] for window in step.windows]
        batch: dict[str, Tensor] = default_collate(rows)
        return batch | {"shard": torch.tensor(step.shard)}
