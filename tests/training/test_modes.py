"""Students are trained in evaluation mode, but for what has to know that it is trained."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_smoe.models.walk import decoder_layers
from lightning_smoe.training.adapters import prepare_training
from lightning_smoe.training.layerwise import Layerwise, LayerwiseModule
from lightning_smoe.training.lora import Lora
from lightning_smoe.training.modes import set_modes
from tests.training.students import QUIET, fit, module, pair, text, trainer

pytestmark = QUIET


def training(student: nn.Module) -> set[str]:
    """Names of the modules that are in training mode."""
    return {name for name, part in student.named_modules() if part.training}


def test_only_the_dropout_of_adapters_is_on() -> None:
    student, _ = pair("qwen2_moe")
    student.train()
    lora = Lora(rank=2, targets=("attention",), dropout=0.1)
    prepare_training(student, (), lora, learning_rate=1e-3)
    set_modes(student, gradient_checkpointing=False)
    found = training(student)
    assert found
    assert all(".lora_dropout." in name for name in found)


def test_checkpointing_flags_decoder_layers_and_nothing_in_them() -> None:
    student, _ = pair("qwen2_moe")
    set_modes(student, gradient_checkpointing=True)
    assert training(student) == {f"model.layers.{i}" for i in range(len(decoder_layers(student)))}


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {}])
def test_training_leaves_the_modes_as_they_are(options: dict[str, Any], tmp_path: Path) -> None:
    recovery = module(tmp_path, **options)
    before = training(recovery.student)
    fit(recovery, text(), 2)
    assert training(recovery.student) == before


def test_training_layers_by_themselves_leaves_the_modes_as_they_are() -> None:
    student, teacher = pair("qwen2_moe")
    prepare_training(student, ("router",), None, learning_rate=1e-3)
    set_modes(student, gradient_checkpointing=True)
    before = training(student)
    layers = LayerwiseModule(student, teacher, Layerwise(tokens=128, passes=1))
    trainer(1).predict(layers, text().train_dataloader(), return_predictions=False)
    assert training(student) == before
