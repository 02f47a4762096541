"""Hooks of the calibration: they change nothing and go away."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.calibration.module import CalibrationModule, ExpertStatistics
from tests.calibration.batches import (
    DOMAINS,
    MANIFEST,
    WindowData,
    gather,
    num_hooks,
    predict,
    random_windows,
)
from tests.families import build


def test_no_hook_is_left_after_calibration() -> None:
    model = build("qwen2_moe")
    before = num_hooks(model)
    gather(model, random_windows())
    assert num_hooks(model) == before


class FailAtOnce(Callback):
    """Stands for whatever goes wrong behind the first batch."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, *args: object
    ) -> None:
        raise self._error


def test_no_hook_is_left_after_an_error() -> None:
    model = build("qwen2_moe")
    before = num_hooks(model)
    watch = ExpertStatistics(DOMAINS, MANIFEST)
    fail = FailAtOnce(RuntimeError("the disk is full"))
    with pytest.raises(RuntimeError, match="the disk is full"):
        predict(CalibrationModule(model), WindowData(random_windows()), watch, fail)
    assert num_hooks(model) == before


def test_no_hook_is_left_after_an_interrupt() -> None:
    model = build("qwen2_moe")
    before = num_hooks(model)
    watch = ExpertStatistics(DOMAINS, MANIFEST)
    with pytest.raises(SystemExit):
        predict(
            CalibrationModule(model),
            WindowData(random_windows()),
            watch,
            FailAtOnce(KeyboardInterrupt()),
        )
    assert num_hooks(model) == before


def test_the_observed_model_gives_its_own_hidden_states(tiny_moe: PreTrainedModel) -> None:
    states: list[Tensor] = []
    tiny_moe.base_model.get_submodule("norm").register_forward_hook(
        lambda _module, _args, output: states.append(output)
    )
    windows = random_windows(4)
    with torch.no_grad():
        tiny_moe.base_model(windows.input_ids, attention_mask=windows.attention_mask)
    gather(tiny_moe, windows)
    real = windows.attention_mask.bool()
    torch.testing.assert_close(states[1][real], states[0][real], rtol=1e-4, atol=1e-5)
