"""What can be known before a training: refused before any work is spent."""

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_smoe.errors import InputError
from lightning_smoe.models.checkpoint import outline
from lightning_smoe.models.head import vocab_size_of
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.teaching import check_cached, plan_cache
from lightning_smoe.training.keeping import CHECKPOINT_BYTES
from lightning_smoe.training.lora import check_lora
from lightning_smoe.training.losses import Losses
from lightning_smoe.training.trainable import TrainedGroup, find_trained
from lightning_smoe.workspace import Workspace


def check_training(trainer: Trainer, work: Workspace) -> None:
    """Checks what only fit needs, before any work.

    Raises:
        InputError: A part to train is not there, an objective cannot be taken, steps would never be
            validated, or the text does not fill a step.
        OSError: Results or checkpoints do not fit on the disk.
    """
    _check_loop(trainer, work)
    groups = _check_recovery(trainer, work)
    results = (work.compressed_path, work.recovered_path)
    work.check_space(*results, more=_training_bytes(work, groups))
    work.data.check_fills_a_step(trainer.world_size, trainer.accumulate_grad_batches)


def _check_loop(trainer: Trainer, work: Workspace) -> None:
    steps, interval = trainer.max_steps, trainer.val_check_interval
    window = trainer.accumulate_grad_batches
    batches = steps * window
    if steps < 0 and trainer.max_epochs in (None, -1):
        raise InputError("nothing ends training; set trainer.max_steps, or trainer.max_epochs")
    if interval == 0:
        raise InputError("trainer.val_check_interval=0 never validates; set it to 1 or more")
    # In epochs, only the training itself knows their length.
    if isinstance(interval, int) and trainer.check_val_every_n_epoch is None:
        _check_interval(interval, window, batches)
    if work.dtype != torch.float32 and "mixed" not in str(trainer.precision):
        mixed = "16-mixed" if work.dtype == torch.float16 else "bf16-mixed"
        raise InputError(
            f"model.dtype={work.experiment.dtype} with trainer.precision={trainer.precision}: "
            f"trained parts are held in float32; set trainer.precision to {mixed}"
        )


def _check_interval(interval: int, window: int, batches: int) -> None:
    """Checks that each validation falls between steps, and one behind the last step."""
    if 0 <= batches < interval:
        raise InputError(
            f"trainer.max_steps={batches // window} ends training before the first validation, "
            f"after {interval} batches; raise it, or lower trainer.val_check_interval"
        )
    if interval % window:
        raise InputError(
            f"trainer.val_check_interval={interval} falls into a step of {window} batches; make it "
            "a multiple of trainer.accumulate_grad_batches"
        )
    if batches >= 0 and batches % interval:
        raise InputError(
            f"trainer.max_steps={batches // window} leaves {batches % interval} batches behind the "
            f"last validation, which are never judged; make it a multiple of {interval // window}, "
            "or change trainer.val_check_interval"
        )


def _check_recovery(trainer: Trainer, work: Workspace) -> list[TrainedGroup]:
    """Checks what is trained on the outline of the original, and returns it."""
    recovery = work.experiment.recovery
    model = outline(work.source)
    groups = find_trained(model, recovery.parts, recovery.learning_rate)
    if recovery.lora is not None:
        check_lora(model, recovery.lora, groups)
    layers = find_moe_layers(model)
    Losses(
        model, layers, recovery.objectives, {x.name: torch.arange(x.num_experts) for x in layers}
    )
    check_cached(recovery, vocab_size_of(model))
    if recovery.teacher.placement == "sharded" and trainer.world_size == 1:
        raise InputError(
            "model.recovery.teacher.placement=sharded needs several processes; use device, or "
            "offload"
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        _check_slices_have_work(work)
    return groups


def _training_bytes(work: Workspace, groups: Sequence[TrainedGroup]) -> int:
    """What checkpoints that are still to come take, one more than stays; adapters left out."""
    files = [work.training_path / name for name in ("last.ckpt", "best.ckpt")]
    count = 1 + sum(not file.exists() for file in files)
    return count * CHECKPOINT_BYTES * sum(group.num_parameters for group in groups)


def _check_slices_have_work(work: Workspace) -> None:
    if not work.compressed_path.exists():
        raise InputError(
            f"there is no {work.compressed_path}, and compression needs whole weights; run "
            "compress first, under trainer.strategy=ddp or on one device"
        )
    if work.experiment.overwrite:
        raise InputError(
            f"model.overwrite would make {work.compressed_path} anew, which needs whole weights; "
            f"delete {work.recovered_path} and {work.training_path} instead"
        )
    if work.experiment.recovery.teacher.cache is not None and plan_cache(work).missing():
        raise InputError(
            f"{work.teacher_path} lacks answers, and a model in slices cannot be asked for them; "
            "run `python -m lightning_smoe cache` first, under ddp or on one device"
        )


def check_slices(strategy: ModelParallelStrategy) -> None:
    """Checks how models are shared out (FSDP2), before any work.

    Raises:
        InputError: It is not among all processes, a layer's matrices would be split too, or
            checkpoints written as folders.
    """
    number = strategy.num_processes * strategy.num_nodes
    sizes = (strategy._data_parallel_size, strategy._tensor_parallel_size)
    if sizes != (number, 1) or strategy._save_distributed_checkpoint:
        raise InputError(
            "ModelParallelStrategy has to share out whole layers among all processes and to write "
            f"checkpoints as one file; set its init_args to {{data_parallel_size: {number}, "
            "tensor_parallel_size: 1, save_distributed_checkpoint: false}"
        )
