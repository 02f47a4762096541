"""The steps before training: each runs those before it, and is skipped if its result is there."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_smoe.calibration.module import CalibrationModule, ExpertStatistics
from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.compression.carry_out import carry_out
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.errors import InputError
from lightning_smoe.measure import decide
from lightning_smoe.models.artifact import Manifest, is_current, write_json
from lightning_smoe.models.isolation import check_residence_isolates
from lightning_smoe.models.progress import drop_parts
from lightning_smoe.models.streamed import Streamed
from lightning_smoe.models.trial_run import check_runs
from lightning_smoe.results import (
    note_outcomes,
    plan_steps,
    save_result,
    stream_result,
    stream_statistics,
)
from lightning_smoe.workspace import Workspace, found_manifest

logger = logging.getLogger(__name__)


def calibrate(trainer: Trainer, work: Workspace) -> None:
    """Writes statistics.safetensors."""
    wanted, found = work.statistics_manifest, work.found_statistics()
    with running_step(trainer, work, work.statistics_path, found=found, wanted=wanted) as needed:
        if not needed:
            return
        residence = work.residence()
        check_runs(residence)
        if work.data.windows("calib").isolated:
            check_residence_isolates(residence)
        if residence.streams:
            path = work.statistics_path
            stream_statistics(trainer, work, residence, path=path, manifest=wanted)
            return
        # What a run left that went layer by layer and was killed.
        drop_parts(work.statistics_path)
        watch = ExpertStatistics(work.data.domains_of("calib"), wanted, work.sample_stride)
        module = CalibrationModule(residence.model)
        with _also(trainer, watch):
            trainer.predict(module, datamodule=work.data, return_predictions=False)
        if trainer.is_global_zero:
            watch.statistics.save(work.statistics_path)


def plan(trainer: Trainer, work: Workspace) -> None:
    """Writes plan.json, unless a person wrote one."""
    found = None
    if work.plan_path.exists():
        found = CompressionPlan.load(work.plan_path).manifest
        if found is None or not work.experiment.overwrite:
            work.read_plan()
        if found is None:
            logger.info("plan: %s was written by hand and is used as it is", work.plan_path)
            return
    calibrate(trainer, work)
    wanted = work.plan_manifest
    if found is not None and found.digest == wanted.digest:
        # Also under overwrite: the same inputs give the same plan, but for a person's edits.
        logger.info("plan: %s is there already, made from the same inputs", work.plan_path)
        return
    with running_step(trainer, work, work.plan_path, found=found, wanted=wanted) as needed:
        if needed and trainer.is_global_zero:
            statistics = Statistics.load(work.statistics_path)
            decided = decide(trainer, work, work.residence(), statistics, manifest=wanted)
            decided.save(work.plan_path)


def compress(trainer: Trainer, work: Workspace) -> None:
    """Writes compressed/."""
    plan(trainer, work)
    decided = work.read_plan()
    if decided.needs_sample:
        calibrate(trainer, work)
    wanted = work.compressed_manifest(decided)
    found = found_manifest(work.compressed_path)
    with running_step(trainer, work, work.compressed_path, found=found, wanted=wanted) as needed:
        if not needed:
            return
        needs_sample = decided.needs_sample
        samples = Statistics.load(work.statistics_path).samples if needs_sample else {}
        residence, path = work.residence(), work.compressed_path
        if isinstance(residence, Streamed):
            stream_result(
                trainer, work, residence, decided, path=path, manifest=wanted, samples=samples
            )
        else:
            drop_parts(path)
            refits = carry_out(trainer, work.data, residence.model, decided, samples=samples)
            if trainer.is_global_zero:
                note_outcomes(work, refits)
                steps = plan_steps(decided, refits)
                save_result(work, residence.model, path, manifest=wanted, steps=steps)


@contextmanager
def running_step(
    trainer: Trainer,
    work: Workspace,
    path: Path,
    *,
    found: Manifest | None,
    wanted: Manifest,
    replace: bool = False,
) -> Iterator[bool]:
    """Says whether a step must run; waits for all processes and notes the time behind it.

    Args:
        trainer: Knows the processes.
        work: The experiment.
        path: The step's result.
        found: What the result that is there was made from.
        wanted: What it is to be made from.
        replace: Replace another run's result, as `overwrite` does.
    """
    # Between two barriers no process writes, so all see the same files and decide alike.
    trainer.strategy.barrier()
    current = is_current(path, found, wanted, work.experiment.overwrite or replace)
    trainer.strategy.barrier()
    if current:
        if trainer.is_global_zero:
            drop_parts(path)
        logger.info("%s: %s is there already, made from the same inputs", wanted.step, path)
        yield False
        return
    if isinstance(trainer.strategy, ModelParallelStrategy) and wanted.step != "fit":
        raise InputError(
            f"{path} would have to be made anew (model.overwrite is "
            f"{str(work.experiment.overwrite).lower()}), which needs whole weights; run "
            f"{wanted.step} first, under trainer.strategy=ddp or on one device"
        )
    start = time.monotonic()
    yield True
    trainer.strategy.barrier()
    seconds = time.monotonic() - start
    if trainer.is_global_zero:
        note_seconds(work, wanted.step, seconds)
        logger.info("%s: wrote %s in %.1f s", wanted.step, path, seconds)


def read_seconds(work: Workspace) -> dict[str, float]:
    """Wall time of each step that ran, in seconds, by verb."""
    path = work.folder / "seconds.json"
    found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    return found


def note_seconds(work: Workspace, step: str, seconds: float) -> None:
    """Notes the wall time of a step beside the results, which must not depend on it."""
    write_json(work.folder / "seconds.json", {**read_seconds(work), step: round(seconds, 2)})


@contextmanager
def _also(trainer: Any, callback: Callback) -> Iterator[None]:
    """Lets a callback take part for a while."""
    trainer.callbacks.append(callback)
    try:
        yield
    finally:
        trainer.callbacks.remove(callback)
