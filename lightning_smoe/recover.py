"""The step that trains: can be cut off and continued, and never ends worse than it began."""

import gc
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_smoe.errors import InputError
from lightning_smoe.layer_stage import read_stage, train_layers
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.head import check_isolates
from lightning_smoe.pipeline import compress, running_step
from lightning_smoe.results import save_result
from lightning_smoe.teaching import make_cache, open_teacher
from lightning_smoe.training.adapters import merge_trained
from lightning_smoe.training.keeping import checkpoint_bytes
from lightning_smoe.training.layer_objectives import LayerObjective
from lightning_smoe.training.objective_names import distinct_names
from lightning_smoe.training.recovery import RecoveryModule
from lightning_smoe.training.trained_state import load_trained
from lightning_smoe.training_folder import TrainingFolder
from lightning_smoe.workspace import Workspace, found_manifest

logger = logging.getLogger(__name__)


def recover(trainer: Trainer, work: Workspace, goes_on: bool) -> None:
    """Writes recovered/.

    Args:
        trainer: Runs the training loop.
        work: The experiment.
        goes_on: Whether to go on from the newest checkpoint also where settings were others; it is
            gone on from anyway where a run with the very same inputs was cut off.
    """
    compress(trainer, work)
    wanted = work.recovered_manifest(_loop_settings(trainer))
    found = found_manifest(work.recovered_path)
    place = TrainingFolder(work.training_path, wanted)
    # Going on from a checkpoint with other settings is meant to replace what it led to.
    differs = found is not None and found.digest != wanted.digest
    replace = goes_on and differs and place.last.exists()
    with running_step(
        trainer, work, work.recovered_path, found=found, wanted=wanted, replace=replace
    ) as needed:
        if needed:
            resume = place.find(goes_on, work.experiment.overwrite)
            if work.experiment.recovery.teacher.cache is not None:
                make_cache(trainer, work)
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                place.prepare(resume, work.experiment.overwrite)
            trainer.strategy.barrier()
            start, best = _train(trainer, work, resume)
            # Callbacks and their module hold each other.
            gc.collect()
            if trainer.is_global_zero:
                _finish(work, wanted, kl=(start, best), num_steps=trainer.global_step)


def _train(trainer: Trainer, work: Workspace, resume: Path | None) -> tuple[float, float]:
    """Trains; returns the validation KL before, and the best of training.

    Raises:
        InputError: Training ended before anything was validated.
    """
    recovery = work.experiment.recovery
    student = load(work.compressed_path, work.dtype)
    if any(work.data.windows(split).isolated for split in ("train", "valid")):
        check_isolates(student)
    of_layers = [o for o in recovery.objectives if isinstance(o, LayerObjective)]
    signals = {signal for o in of_layers if o.needs_teacher for signal in o.signals}
    module = RecoveryModule(
        student,
        open_teacher(work, signals),
        recovery,
        work.training_path,
        domains=work.data.domains_of("valid"),
        assignments=_assignments(work),
    )
    for part, count in module.trainable_counts.items():
        logger.info("fit: %s is trained, %s parameters", part, f"{count:,}")
    logger.info("fit: a checkpoint holds %.1f MB", checkpoint_bytes(module) / 1e6)

    def validate() -> float:
        (found,) = trainer.validate(module, datamodule=work.data, verbose=False)
        return found["valid/kl"]

    start = validate()
    if resume is None:
        train_layers(trainer, work, module, start=start, validate=validate)
    trainer.fit(module, datamodule=work.data, ckpt_path=resume)
    checkpoint = trainer.checkpoint_callback
    best = checkpoint.best_model_score if isinstance(checkpoint, ModelCheckpoint) else None
    _forget(trainer, module)
    if best is None:
        raise InputError(
            "training ended before the first validation; lower trainer.val_check_interval below "
            f"the {trainer.global_step} steps that were taken"
        )
    return start, best.item()


def _forget(trainer: Trainer, module: RecoveryModule) -> None:
    """Takes away what the trainer holds of a training, so that its memory can be used again."""
    ours = {id(callback) for callback in module.configure_callbacks()}
    trainer.callbacks[:] = [c for c in trainer.callbacks if id(c) not in ours]  # type: ignore[attr-defined]  # set by Lightning
    strategy: Any = trainer.strategy
    strategy._lightning_module = strategy.model = None
    strategy.optimizers, strategy.lr_scheduler_configs = [], []
    # Private in Lightning 2.6, which keeps the module of the last loop there.
    selector: Any = trainer._data_connector._datahook_selector
    selector.model = None


def _finish(work: Workspace, wanted: Manifest, *, kl: tuple[float, float], num_steps: int) -> None:
    """Writes recovered/: the student where its KL was lowest, be it before all training."""
    (start, best), recovery = kl, work.experiment.recovery
    stage, adapter = read_stage(work), work.folder / "adapter"
    # One of another training would not lead to what is written here.
    shutil.rmtree(adapter, ignore_errors=True)
    student = load(work.compressed_path, work.dtype)
    reached = min(best, stage[0]) if stage is not None else best
    where = "" if recovery.teacher.cache is None else " on the tokens that the cache names"
    if reached < start:
        helped = stage is not None and stage[0] < start
        steps = ["Each layer trained by itself against the original's."] if helped else []
        if stage is not None and stage[0] <= best:
            state = stage[1]
            logger.warning("fit: training all layers together did not lower the KL, and is left")
        else:
            state = _best_state(work)
            names = ", ".join(distinct_names([o.name for o in recovery.objectives]))
            steps.append(f"Trained against the original on {names}, {num_steps} steps.")
        logger.info("fit: validation KL%s %.4g -> %.4g", where, start, reached)
        if recovery.lora is None:
            load_trained(student, state)
        else:
            adapted = str(work.compressed_path.resolve())
            merge_trained(student, recovery.lora, state, adapter=adapter, adapted=adapted)
    else:
        steps = ["Training against the original did not help: these are the weights before it."]
        logger.warning(
            "fit: training did not lower the validation KL%s (%.4g -> %.4g); recovered/ holds the "
            "compressed model as it was", where, start, best,
        )  # fmt: skip
    save_result(work, student, work.recovered_path, manifest=wanted, steps=steps)


def _best_state(work: Workspace) -> dict[str, Tensor]:
    """What was trained, by names in the student, where its KL was lowest."""
    state = torch.load(work.training_path / "best.ckpt", "cpu", weights_only=True)["state_dict"]
    return {name.removeprefix("student."): tensor for name, tensor in state.items()}


def _assignments(work: Workspace) -> dict[str, Tensor]:
    """Where each expert of the original went, by layer; it stays where no plan names the layer."""
    plans = work.read_plan().by_name()
    return {
        layer.name: plans[layer.name].grouping.assignment
        if layer.name in plans
        else torch.arange(layer.num_experts)
        for layer in work.layers
    }


def _loop_settings(trainer: Trainer) -> dict[str, Any]:
    """Settings of the training loop that decide its result."""
    names = ["max_steps", "max_epochs", "accumulate_grad_batches"]
    names += ["gradient_clip_val", "gradient_clip_algorithm", "precision", "world_size"]
    names += ["val_check_interval", "check_val_every_n_epoch"]
    in_slices = isinstance(trainer.strategy, ModelParallelStrategy)
    return {name: getattr(trainer, name) for name in names} | {"in_slices": in_slices}
