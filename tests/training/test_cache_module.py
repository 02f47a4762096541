"""A cache is the same however it was made: at once, in two goes, or by two processes."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_smoe.errors import InputError
from lightning_smoe.training.cache_module import CacheModule, _ShardBatches
from lightning_smoe.training.teacher import LiveTeacher
from tests.training.caches import contents, fill, plan, teacher_model, text


class Killed(Callback):
    """Ends the process at once after some batches."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        if args[0] == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_is_killed_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    whole, cut = (plan(tmp_path / name / "teacher", text(), top_k=5) for name in ("a", "b"))
    fill(whole, text())

    def run() -> None:
        fill(cut, text(), callbacks=[Killed(after=2)])

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    names = {"manifest.json", "train-00000000.safetensors"}
    assert contents(cut.path).keys() == names
    first = (cut.path / "train-00000000.safetensors").stat().st_mtime_ns
    assert not cut.is_complete()
    # Also where results of other runs are replaced: this one is no other.
    fill(cut, text(), overwrite=True)
    assert contents(cut.path) == contents(whole.path)
    assert (cut.path / "train-00000000.safetensors").stat().st_mtime_ns == first


@pytest.mark.parametrize("windows", [4, 3])
def test_two_processes_give_the_bytes_of_one(windows: int, tmp_path: Path) -> None:
    one, two = (
        plan(tmp_path / name / "teacher", text(), top_k=5, windows=windows) for name in ("a", "b")
    )
    fill(one, text())
    fill(two, text(), devices=2, strategy="ddp_fork")
    assert contents(two.path) == contents(one.path)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_every_process_has_whole_files_and_as_many_batches(
    num_processes: int, tmp_path: Path
) -> None:
    missing = plan(tmp_path, text(), windows=3).missing()
    batches = _ShardBatches(text(), missing, 2, num_processes)
    assert len(batches) % num_processes == 0
    seen = []
    for rank in range(num_processes):
        own = [batches[i, True] for i in range(rank, len(batches), num_processes)]
        real = [batch for batch in own if batch["valid"].all()]
        assert all(not batch["valid"].any() for batch in own[len(real) :])
        seen += [(int(b["shard"]), w, rank) for b in real for w in b["window"].tolist()]
    wanted = {
        (i, window)
        for i, shard in enumerate(missing)
        for window in range(shard.first, shard.first + shard.num_windows)
    }
    assert len(seen) == len(wanted)
    assert {(shard, window) for shard, window, _ in seen} == wanted
    assert all(rank == shard % num_processes for shard, _, rank in seen)


def test_a_model_with_another_vocabulary_than_planned_is_refused(tmp_path: Path) -> None:
    planned = {"vocab_size": 100}
    cache = plan(tmp_path / "teacher", text(), top_k=200, planned=planned)
    with pytest.raises(InputError, match="another vocabulary than the 100 tokens"):
        fill(cache, text())


def test_the_teacher_is_no_part_of_the_module(tmp_path: Path) -> None:
    cache = plan(tmp_path / "teacher", text())
    module = CacheModule(LiveTeacher(teacher_model()), text(), cache, cache.missing())
    assert not list(module.parameters())
