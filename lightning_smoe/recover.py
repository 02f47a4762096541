"""The step that trains: can be cut off and continued, and never ends worse than it began."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_smoe.errors import InputError
from lightning_smoe.models.artifact import Manifest, write_json
from lightning_smoe.models.checkpoint import load
from lightning_smoe.pipeline import compress, running_step, save_result
from lightning_smoe.training.recovery import RecoveryModule
from lightning_smoe.training.trainable import find_parts
from lightning_smoe.workspace import Workspace, found_manifest

logger = logging.getLogger(__name__)


def check_training(trainer: Trainer, work: Workspace, ckpt_path: str | None) -> None:
    """Checks what only fit needs, before any work.

    Raises:
        InputError: A part to train is not there, training would end before it is validated, the
            text does not fill a step, or there is no such checkpoint.
    """
    find_parts(work.layers, work.experiment.recovery.trainable)
    steps, interval = trainer.max_steps, trainer.val_check_interval
    batches = steps * trainer.accumulate_grad_batches
    if steps < 0 and trainer.max_epochs in (None, -1):
        raise InputError("nothing ends training; set trainer.max_steps, or trainer.max_epochs")
    if isinstance(interval, int) and 0 <= batches < interval:
        raise InputError(
            f"trainer.max_steps={steps} ends training before the first validation, after "
            f"{interval} batches; raise it, or lower trainer.val_check_interval"
        )
    if work.dtype != torch.float32 and "mixed" not in str(trainer.precision):
        mixed = "16-mixed" if work.dtype == torch.float16 else "bf16-mixed"
        raise InputError(
            f"model.dtype={work.experiment.dtype} with trainer.precision={trainer.precision}: "
            f"trained parts are held in float32; set trainer.precision to {mixed}"
        )
    if ckpt_path not in (None, "last") and not Path(ckpt_path).is_file():
        last = work.training_path / "last.ckpt"
        raise InputError(f"--ckpt_path {ckpt_path}: there is no such file; 'last' takes {last}")
    work.check_space(work.compressed_path, work.recovered_path)
    work.data.check_fills_a_step(trainer.world_size)


def recover(trainer: Trainer, work: Workspace, ckpt_path: str | None) -> None:
    """Writes recovered/.

    Args:
        trainer: Runs the training loop.
        work: The experiment.
        ckpt_path: Lightning checkpoint to continue; `last` is the newest of this experiment; none
            continues only what was cut off with the very same inputs.
    """
    compress(trainer, work)
    wanted = work.recovered_manifest(_loop_settings(trainer))
    found = found_manifest(work.recovered_path)
    # Going on from a checkpoint with other settings is meant to replace what it led to.
    goes_on = ckpt_path is not None and found is not None and found.digest != wanted.digest
    with running_step(
        trainer, work, work.recovered_path, found=found, wanted=wanted, replace=goes_on
    ) as needed:
        if needed:
            resume = _resume_from(work, wanted, ckpt_path)
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                if resume is None:
                    shutil.rmtree(work.training_path, ignore_errors=True)
                write_json(work.training_path / "manifest.json", wanted.to_json())
            _train(trainer, work, wanted, resume)


def _train(trainer: Trainer, work: Workspace, wanted: Manifest, resume: Path | None) -> None:
    student = load(work.compressed_path, work.dtype)
    teacher = load(work.source.path, work.dtype)
    module = RecoveryModule(student, teacher, work.experiment.recovery, work.training_path)
    for part, count in module.trainable_counts.items():
        logger.info("fit: %s is trained, %s parameters", part, f"{count:,}")
    start = trainer.validate(module, datamodule=work.data, verbose=False)[0]["valid/kl"]
    trainer.fit(module, datamodule=work.data, ckpt_path=resume)
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
        student = module.finished_student()
        logger.info("fit: validation KL %.4f -> %.4f", start, best)
    else:
        student = load(work.compressed_path, work.dtype)
        steps = ["Training against the original did not help: these are the weights before it."]
        logger.warning(
            "fit: training did not lower the validation KL (%.4f -> %.4f); recovered/ holds the "
            "compressed model as it was", start, best,
        )  # fmt: skip
    if trainer.is_global_zero:
        save_result(work, student, work.recovered_path, manifest=wanted, steps=steps)


def _loop_settings(trainer: Trainer) -> dict[str, Any]:
    """Settings of the training loop that decide its result."""
    names = ["max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val"]
    names += ["precision", "world_size", "val_check_interval"]
    return {name: getattr(trainer, name) for name in names}


def _resume_from(work: Workspace, wanted: Manifest, ckpt_path: str | None) -> Path | None:
    last, origin = work.training_path / "last.ckpt", work.training_path / "manifest.json"
    if ckpt_path not in (None, "last"):
        return Path(str(ckpt_path))
    made_from = json.loads(origin.read_text()) if origin.exists() else {}
    same = made_from.get("digest") == wanted.digest and not work.experiment.overwrite
    if last.exists() and (same or ckpt_path == "last"):
        logger.info("fit: training goes on from %s", last)
        return last
    if ckpt_path == "last":
        logger.info("fit: there is no %s to continue; training starts at the beginning", last)
    return None
