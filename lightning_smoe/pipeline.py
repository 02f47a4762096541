"""The steps behind the verbs: each runs those before it, and is skipped if its result is there."""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import PreTrainedModel

from lightning_smoe.calibration.module import CalibrationModule, ExpertStatistics
from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.compression.apply import apply_plan
from lightning_smoe.compression.module import CompressionModule
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.planner import experts_to_keep, make_plan
from lightning_smoe.errors import InputError
from lightning_smoe.experiment import Workspace, found_manifest
from lightning_smoe.models.artifact import Manifest, is_current, write_json
from lightning_smoe.models.card import model_card
from lightning_smoe.models.checkpoint import load, save
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.training.recovery import RecoveryModule

logger = logging.getLogger(__name__)


def calibrate(trainer: Trainer, work: Workspace) -> None:
    """Writes statistics.safetensors."""
    wanted, found = work.statistics_manifest, work.found_statistics()
    with _step(trainer, work, work.statistics_path, found=found, wanted=wanted) as needed:
        if not needed:
            return
        watch = ExpertStatistics(
            work.data.domains_of("calib"), wanted, bool(wanted.inputs["all_experts"])
        )
        module = CalibrationModule(load(work.source.path, work.dtype))
        with _also(trainer, watch):
            trainer.predict(module, datamodule=work.data, return_predictions=False)
        if trainer.is_global_zero:
            watch.statistics.save(work.statistics_path)


def plan(trainer: Trainer, work: Workspace) -> None:
    """Writes plan.json, unless a person wrote one."""
    found = None
    if work.plan_path.exists() and not work.experiment.overwrite:
        found = work.read_plan().manifest
        if found is None:
            logger.info("plan: %s was written by hand and is used as it is", work.plan_path)
            return
    calibrate(trainer, work)
    wanted = work.plan_manifest
    with _step(trainer, work, work.plan_path, found=found, wanted=wanted) as needed:
        if needed and trainer.is_global_zero:
            counts = {c.name: experts_to_keep(work.experiment.keep, c) for c in work.chosen}
            statistics = Statistics.load(work.statistics_path)
            recipe = work.experiment.recipe
            decided = make_plan(statistics, work.chosen, recipe, counts, manifest=wanted)
            decided.save(work.plan_path)


def compress(trainer: Trainer, work: Workspace) -> None:
    """Writes compressed/."""
    plan(trainer, work)
    decided = work.read_plan()
    wanted = work.compressed_manifest(decided)
    found = found_manifest(work.compressed_path)
    with _step(trainer, work, work.compressed_path, found=found, wanted=wanted) as needed:
        if not needed:
            return
        model = load(work.source.path, work.dtype)
        if decided.reads_tokens:
            module = CompressionModule(model, decided)
            trainer.predict(module, datamodule=work.data, return_predictions=False)
        else:
            apply_plan(model, decided)
        if trainer.is_global_zero:
            steps = _compression_steps(decided)
            _save(work, model, work.compressed_path, manifest=wanted, steps=steps)


def recover(trainer: Trainer, work: Workspace, ckpt_path: str | None) -> None:
    """Writes recovered/.

    Args:
        trainer: Runs the training loop.
        work: The experiment.
        ckpt_path: Lightning checkpoint to continue; `last` is the newest of this experiment.
    """
    compress(trainer, work)
    wanted = work.recovered_manifest(_loop_settings(trainer))
    found = found_manifest(work.recovered_path)
    with _step(trainer, work, work.recovered_path, found=found, wanted=wanted) as needed:
        if needed:
            _train(trainer, work, wanted, _resume_from(work, ckpt_path))


def _train(trainer: Trainer, work: Workspace, wanted: Manifest, resume: Path | None) -> None:
    student = load(work.compressed_path, work.dtype)
    teacher = load(work.source.path, work.dtype)
    module = RecoveryModule(student, teacher, work.experiment.recovery, work.training_path)
    for part, count in module.trainable_counts.items():
        logger.info("fit: %s is trained, %s parameters", part, f"{count:,}")
    start = trainer.validate(module, datamodule=work.data, verbose=False)[0]["valid/kl"]
    trainer.fit(module, datamodule=work.data, ckpt_path=resume)
    if trainer.interrupted:
        raise KeyboardInterrupt
    checkpoint = trainer.checkpoint_callback
    best = checkpoint.best_model_score if isinstance(checkpoint, ModelCheckpoint) else None
    if best is None:
        raise InputError(
            "training ended before the first validation; lower trainer.val_check_interval below "
            f"the {trainer.global_step} steps that were taken"
        )
    steps = [f"Trained against the original on KL, {trainer.global_step} steps."]
    if best < start:
        best_path = Path(str(checkpoint.best_model_path))  # type: ignore[union-attr] # as above
        state = torch.load(best_path, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict(state, strict=False)
        logger.info("fit: validation KL %.4f -> %.4f", start, best)
    else:
        student = load(work.compressed_path, work.dtype)
        steps = ["Training against the original did not help: these are the weights before it."]
        logger.warning(
            "fit: training did not lower the validation KL (%.4f -> %.4f); recovered/ holds the "
            "compressed model as it was", start, best,
        )  # fmt: skip
    if trainer.is_global_zero:
        _save(work, student, work.recovered_path, manifest=wanted, steps=steps)


def _save(
    work: Workspace, model: PreTrainedModel, path: Path, *, manifest: Manifest, steps: list[str]
) -> None:
    model.cpu()
    before = {layer.name: layer.num_experts for layer in work.layers}
    after = {layer.name: layer.num_experts for layer in find_moe_layers(model)}
    title = f"{work.source.path.name}, {path.name}"
    card = model_card(
        title, work.source, before=before, after=after, steps=steps, manifest=manifest
    )
    save(model, work.source, path, manifest=manifest, card=card)


def _compression_steps(decided: CompressionPlan) -> list[str]:
    merged = any(len(group) > 1 for layer in decided.layers for group in layer.groups)
    steps = [f"Experts merged by {decided.merger}." if merged else "Experts pruned."]
    steps.append(f"Router repaired by {decided.router}.")
    if decided.refit is not None:
        steps.append(f"Output matrices refitted in closed form ({decided.refit}).")
    return steps


def _loop_settings(trainer: Trainer) -> dict[str, Any]:
    """Settings of the training loop that decide its result."""
    return {
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "precision": trainer.precision,
        "world_size": trainer.world_size,
        "val_check_interval": trainer.val_check_interval,
    }


def _resume_from(work: Workspace, ckpt_path: str | None) -> Path | None:
    last = work.training_path / "last.ckpt"
    if ckpt_path == "last":
        if not last.exists():
            logger.info("fit: there is no %s to continue; training starts at the beginning", last)
            return None
        return last
    if ckpt_path is None:
        shutil.rmtree(work.training_path, ignore_errors=True)
        return None
    if not Path(ckpt_path).is_file():
        raise InputError(f"--ckpt_path {ckpt_path}: there is no such file; 'last' takes {last}")
    return Path(ckpt_path)


@contextmanager
def _step(
    trainer: Trainer, work: Workspace, path: Path, *, found: Manifest | None, wanted: Manifest
) -> Iterator[bool]:
    """Says whether a step must run; waits for all processes and notes the time behind it."""
    if is_current(path, found, wanted, work.experiment.overwrite):
        logger.info("%s: %s is there already, made from the same inputs", wanted.step, path)
        yield False
        return
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
