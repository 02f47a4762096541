"""The stage of recovery in which each layer is trained by itself; done once, kept if it helps."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_smoe.models.artifact import replacing
from lightning_smoe.models.walk import decoder_layers
from lightning_smoe.training.layerwise import Layerwise, LayerwiseModule
from lightning_smoe.training.random_state import read_generators, write_generators
from lightning_smoe.training.recovery import RecoveryModule
from lightning_smoe.training.teacher import LiveTeacher
from lightning_smoe.training.trained_state import load_trained, trained_state
from lightning_smoe.training_folder import STAGE
from lightning_smoe.workspace import Workspace

logger = logging.getLogger(__name__)

_KL = "valid/kl"


def stage_path(work: Workspace) -> Path:
    """Where what the stage trained is kept, with its KL."""
    return work.training_path / STAGE


def read_stage(work: Workspace) -> tuple[float, dict[str, torch.Tensor]] | None:
    """Validation KL after the stage, and the trained tensors; none if it was not run."""
    path = stage_path(work)
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return float(file.metadata()[_KL]), load_file(path)


def train_layers(
    trainer: Trainer,
    work: Workspace,
    module: RecoveryModule,
    *,
    start: float,
    validate: Callable[[], float],
) -> None:
    """Trains each layer of the student by itself, in place, and takes that back if it is no help.

    A run that was cut off behind the stage does not train it again.

    Args:
        trainer: Runs the loop.
        work: The experiment; its layerwise says whether and how.
        module: The student and its teacher.
        start: Validation KL before.
        validate: Measures it.
    """
    options, teacher = _chosen(trainer, work, module), module.teacher
    if options is None or not isinstance(teacher, LiveTeacher):
        return
    before, done = trained_state(module.student), read_stage(work)
    # A run that goes on behind the stage draws the same numbers in the training that follows.
    device = trainer.strategy.root_device
    generators = read_generators(device)
    # Before any process writes, so that all agree on what is there.
    trainer.strategy.barrier()
    if done is None:
        layers = LayerwiseModule(module.student, teacher.model, options, work.data.seed)
        text = work.data.predicting("train", options.tokens)
        trainer.predict(layers, datamodule=text, return_predictions=False)
        done = validate(), trained_state(module.student)
        if trainer.is_global_zero:
            with replacing(stage_path(work)) as partial:
                save_file(done[1], partial, metadata={_KL: repr(done[0])})
    else:
        load_trained(module.student, done[1])
    trainer.strategy.barrier()
    write_generators(generators, device)
    logger.info("fit: each layer by itself: validation KL %.4g -> %.4g", start, done[0])
    if not done[0] < start:
        logger.warning("fit: training each layer by itself did not help, and is taken back")
        load_trained(module.student, before)


def _chosen(trainer: Trainer, work: Workspace, module: RecoveryModule) -> Layerwise | None:
    """How the stage is run; not at all where it cannot be, which is said."""
    recovery = work.experiment.recovery
    if recovery.layerwise is None:
        return None
    why = None
    if not isinstance(module.teacher, LiveTeacher):
        why = "a cache does not hold what layers do"
    elif recovery.teacher.placement == "sharded":
        why = "the teacher is shared out"
    elif isinstance(trainer.strategy, ModelParallelStrategy):
        why = "the student is shared out"
    elif not any(p.requires_grad for p in decoder_layers(module.student).parameters()):
        why = "nothing of a layer is trained"
    if why is None:
        return recovery.layerwise
    logger.info("fit: no layer is trained by itself first: %s", why)
    return None
