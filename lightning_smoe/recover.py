"""The step that trains: can be cut off and continued, and never ends worse than it began."""

import json
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
from lightning_smoe.models.artifact import Manifest, write_json
from lightning_smoe.models.checkpoint import load, outline
from lightning_smoe.models.head import check_isolates, vocab_size_of
from lightning_smoe.pipeline import compress, running_step, save_result
from lightning_smoe.teaching import check_cached, make_cache, open_teacher
from lightning_smoe.training.adapters import merge_trained
from lightning_smoe.training.keeping import checkpoint_bytes
from lightning_smoe.training.layer_objectives import LayerObjective
from lightning_smoe.training.layerwise import LayerwiseModule
from lightning_smoe.training.lora import check_lora
from lightning_smoe.training.recovery import RecoveryModule, load_trained
from lightning_smoe.training.teacher import LiveTeacher
from lightning_smoe.training.trainable import find_trained
from lightning_smoe.workspace import Workspace, found_manifest

logger = logging.getLogger(__name__)


def check_training(trainer: Trainer, work: Workspace, ckpt_path: str | None) -> None:
    """Checks what only fit needs, before any work.

    Raises:
        InputError: A part to train is not there, training would end before it is validated, the
            text does not fill a step, or there is no such checkpoint.
    """
    _check_recovery(work)
    if isinstance(trainer.strategy, ModelParallelStrategy):
        _check_slices_have_work(work)
    if work.experiment.recovery.teacher.placement == "sharded" and trainer.world_size == 1:
        raise InputError(
            "model.recovery.teacher.placement=sharded needs several processes; use device, or "
            "offload"
        )
    steps, interval = trainer.max_steps, trainer.val_check_interval
    batches = steps * trainer.accumulate_grad_batches
    if steps < 0 and trainer.max_epochs in (None, -1):
        raise InputError("nothing ends training; set trainer.max_steps, or trainer.max_epochs")
    if isinstance(interval, int) and 0 <= batches < interval:
        raise InputError(
            f"trainer.max_steps={steps} ends training before the first validation, after "
            f"{interval} batches; raise it, or lower trainer.val_check_interval"
        )
    window = trainer.accumulate_grad_batches
    if isinstance(interval, int) and interval % window:
        raise InputError(
            f"trainer.val_check_interval={interval} falls into a step of {window} batches; make it "
            "a multiple of trainer.accumulate_grad_batches"
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
    work.data.check_fills_a_step(trainer.world_size, window)


def check_slices(strategy: ModelParallelStrategy) -> None:
    """Checks how models are shared out (FSDP2), before any work.

    Raises:
        InputError: A layer's matrices would be split too, or checkpoints written as folders.
    """
    if strategy._tensor_parallel_size != 1 or strategy._save_distributed_checkpoint:
        raise InputError(
            "ModelParallelStrategy has to share out whole layers and to write checkpoints as one "
            "file; set its init_args to {data_parallel_size: NUMBER_OF_PROCESSES, "
            "tensor_parallel_size: 1, save_distributed_checkpoint: false}"
        )


def _check_slices_have_work(work: Workspace) -> None:
    if not work.compressed_path.exists():
        raise InputError(
            f"there is no {work.compressed_path}, and compression needs whole weights; run "
            "compress first, under trainer.strategy=ddp or on one device"
        )


def _check_recovery(work: Workspace) -> None:
    recovery = work.experiment.recovery
    model = outline(work.source)
    groups = find_trained(model, recovery.trainable, recovery.learning_rate)
    if recovery.lora is not None:
        check_lora(model, recovery.lora, groups)
    check_cached(recovery, vocab_size_of(model))


def recover(trainer: Trainer, work: Workspace, ckpt_path: str | None) -> None:
    """Writes recovered/.

    Args:
        trainer: Runs the training loop.
        work: The experiment.
        ckpt_path: Lightning checkpoint to continue; `last` is the newest of this experiment; none
            continues only what was cut off with the very same inputs.
    """
    compress(trainer, work)
    if work.experiment.recovery.teacher.cache is not None:
        make_cache(trainer, work)
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
    recovery = work.experiment.recovery
    student = load(work.compressed_path, work.dtype)
    if any(work.data.windows(split).isolated for split in ("train", "valid")):
        check_isolates(student)
    of_layers = [o for o in recovery.objectives if isinstance(o, LayerObjective)]
    signals = {signal for o in of_layers if o.needs_teacher for signal in o.signals}
    teacher = open_teacher(work, signals)
    module = RecoveryModule(
        student,
        teacher,
        recovery,
        work.training_path,
        domains=work.data.domains_of("valid"),
        assignments=_assignments(work),
    )
    for part, count in module.trainable_counts.items():
        logger.info("fit: %s is trained, %s parameters", part, f"{count:,}")
    logger.info("fit: a checkpoint holds %.1f MB", checkpoint_bytes(module) / 1e6)
    start = _valid_kl(trainer, work, module)
    if resume is None and recovery.layerwise is not None:
        _train_layers(trainer, work, module, start)
    trainer.fit(module, datamodule=work.data, ckpt_path=resume)
    best = _best(trainer)
    if trainer.is_global_zero:
        _finish(work, wanted, (start, best), trainer.global_step)


def _valid_kl(trainer: Trainer, work: Workspace, module: RecoveryModule) -> float:
    (found,) = trainer.validate(module, datamodule=work.data, verbose=False)
    return found["valid/kl"]


def _train_layers(trainer: Trainer, work: Workspace, module: RecoveryModule, start: float) -> None:
    """Trains each layer by itself, and takes that back if it does not help."""
    options = work.experiment.recovery.layerwise
    teacher = module.teacher
    if options is None or not isinstance(teacher, LiveTeacher):
        return
    before = module.trained_state()
    layers = LayerwiseModule(module.student, teacher.model, options, work.data.seed)
    text = work.data.predicting("train", options.tokens)
    trainer.predict(layers, datamodule=text, return_predictions=False)
    after = _valid_kl(trainer, work, module)
    logger.info("fit: each layer by itself: validation KL %.4f -> %.4f", start, after)
    if not after < start:
        logger.warning("fit: training each layer by itself did not help, and is taken back")
        module.load_trained(before)


def _best(trainer: Trainer) -> float:
    """The lowest KL of a validation."""
    checkpoint = trainer.checkpoint_callback
    best = checkpoint.best_model_score if isinstance(checkpoint, ModelCheckpoint) else None
    if best is None:
        raise InputError(
            "training ended before the first validation; lower trainer.val_check_interval below "
            f"the {trainer.global_step} steps that were taken"
        )
    return best.item()


def _finish(work: Workspace, wanted: Manifest, kl: tuple[float, float], num_steps: int) -> None:
    """Writes recovered/: the best student, or the weights before training if it is no better."""
    start, best = kl
    recovery, adapter = work.experiment.recovery, work.folder / "adapter"
    # One of another training would not lead to what is written here.
    shutil.rmtree(adapter, ignore_errors=True)
    student = load(work.compressed_path, work.dtype)
    if best < start:
        state = torch.load(work.training_path / "best.ckpt", "cpu", weights_only=True)["state_dict"]
        state = {name.removeprefix("student."): tensor for name, tensor in state.items()}
        objectives = ", ".join(objective.name for objective in recovery.objectives)
        steps = [f"Trained against the original on {objectives}, {num_steps} steps."]
        logger.info("fit: validation KL %.4f -> %.4f", start, best)
        if recovery.lora is None:
            load_trained(student, state)
        else:
            adapted = str(work.compressed_path.resolve())
            merge_trained(student, recovery.lora, state, adapter=adapter, adapted=adapted)
    else:
        steps = ["Training against the original did not help: these are the weights before it."]
        logger.warning(
            "fit: training did not lower the validation KL (%.4f -> %.4f); recovered/ holds the "
            "compressed model as it was", start, best,
        )  # fmt: skip
    save_result(work, student, work.recovered_path, manifest=wanted, steps=steps)


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
    names = ["max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val"]
    names += ["precision", "world_size", "val_check_interval"]
    in_slices = isinstance(trainer.strategy, ModelParallelStrategy)
    return {name: getattr(trainer, name) for name in names} | {"in_slices": in_slices}


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
