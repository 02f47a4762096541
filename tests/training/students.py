"""A teacher, a student that lost experts, text, and a training of a few steps."""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from transformers import PreTrainedModel

from lightning_smoe.data.text import TextDataModule
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.training.options import Recovery
from lightning_smoe.training.recovery import RecoveryModule
from lightning_smoe.training.teacher import LiveTeacher
from lightning_smoe.training.trainable import find_trained, hold_trainable
from tests.families import build

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "qwen2moe-tiny-8dom"
CORPUS = Path(__file__).parents[2] / "lightning_smoe" / "data" / "corpus"
VOCAB_SIZE = 4096
NUM_KEPT = 8
# Advice of Lightning that the command line leaves out too (`lightning_smoe/show.py`).
QUIET = [
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model that lost a third of its experts, and the model that has them all."""
    teacher = build(family, 0, VOCAB_SIZE)
    student = copy.deepcopy(teacher)
    for layer in find_moe_layers(student):
        layer.select(torch.arange(NUM_KEPT))
    return student, teacher


def text(**options: Any) -> TextDataModule:
    """Short text of two domains; eight sequences to train on."""
    small: dict[str, Any] = {
        # Tokenising the whole training text takes a second.
        "train": str(CORPUS / "valid"),
        "sequence_length": 32,
        "train_tokens": 8 * 32,
        "valid_tokens": 4 * 32,
        "test_tokens": 4 * 32,
        "domains": ["arith", "lit"],
        "batch_size": 2,
    }
    return TextDataModule(tokenizer=CHECKPOINT, **(small | options))


def trainer(max_steps: int, **options: Any) -> Trainer:
    """A trainer that validates every second batch."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": max_steps,
        "max_epochs": 1000,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return Trainer(**(settings | options))


def module(
    folder: Path,
    family: str = "qwen2_moe",
    *,
    domains: Sequence[str] = ("arith", "lit"),
    **recovery: Any,
) -> RecoveryModule:
    """A recovery of a fresh student."""
    options: dict[str, Any] = {"warmup_steps": 1}
    student, teacher = pair(family)
    chosen = Recovery(**(options | recovery))
    return RecoveryModule(student, LiveTeacher(teacher), chosen, folder, domains=domains)


def select(student: PreTrainedModel, names: Sequence[str]) -> dict[str, int]:
    """Lets only what is named change; returns the number of parameters of each."""
    groups = find_trained(student, names, 1e-3)
    hold_trainable(student, groups)
    return {group.name: group.num_parameters for group in groups}


def hashes(model: nn.Module) -> dict[str, str]:
    """Hash of every parameter, by name."""
    return {
        name: hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
    }


class Note(Callback):
    """Notes the loss of every step, and the learning rate of every batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self._step = 0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.losses.append(trainer.callback_metrics["train/loss"].item())


def fit(
    recovery: RecoveryModule, data: TextDataModule, max_steps: int, **options: Any
) -> tuple[Trainer, Note]:
    """Trains for a number of steps."""
    note = Note()
    callbacks: Sequence[Callback] = options.pop("callbacks", [])
    engine = trainer(max_steps, callbacks=[*callbacks, note], **options)
    engine.fit(recovery, datamodule=data)
    return engine, note
