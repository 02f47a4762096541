"""The course of a training: its step sizes, going on after a stop, and several processes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_smoe.errors import InputError
from tests.training.students import QUIET, fit, hashes, module, text, trainer

pytestmark = QUIET


def wanted_rate(step: int, kind: str, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (total - warmup)
    return 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_step_size_rises_over_the_warm_up_and_falls_to_zero(
    kind: str, warmup: int, tmp_path: Path
) -> None:
    recovery = module(tmp_path, schedule=kind, warmup_steps=warmup, learning_rate=0.01)
    engine, note = fit(recovery, text(), 8, limit_val_batches=0)
    expected = [0.01 * wanted_rate(step, kind, warmup, 8) for step in range(8)]
    assert note.rates == pytest.approx(expected)
    assert note.rates[warmup] == 0.01
    assert note.rates[: warmup + 1] == sorted(note.rates[: warmup + 1])
    assert note.rates[warmup:] == sorted(note.rates[warmup:], reverse=True)
    assert note.rates[-1] > 0
    assert engine.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_steps_are_counted_in_updates_where_gradients_are_accumulated(tmp_path: Path) -> None:
    recovery = module(tmp_path, warmup_steps=0)
    engine, note = fit(recovery, text(), 3, accumulate_grad_batches=2, limit_val_batches=0)
    assert len(note.rates) == 6
    assert note.rates[::2] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert engine.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


class StoppedError(Exception):
    """What ends a training in the middle."""


class Stop(Callback):
    """Ends a training after some steps."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            raise StoppedError


PARTS: dict[str, Any] = {"trainable": ("router", "experts"), "learning_rate": 0.003}


@pytest.mark.parametrize("stop", [3, 7])
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(stop: int, tmp_path: Path) -> None:
    # An epoch has four batches; a checkpoint is written behind every second.
    whole = module(tmp_path / "whole", **PARTS)
    engine, _ = fit(whole, text(), 8)
    first = module(tmp_path / "parts", **PARTS)
    with pytest.raises(StoppedError):
        fit(first, text(), 8, callbacks=[Stop(stop)])
    second = module(tmp_path / "parts", **PARTS)
    again = trainer(8)
    again.fit(second, datamodule=text(), ckpt_path=tmp_path / "parts/last.ckpt")
    assert again.global_step == engine.global_step == 8
    assert hashes(second.student) == hashes(whole.student)
    best = [t.checkpoint_callback for t in (engine, again)]
    assert best[0].best_model_score == best[1].best_model_score  # type: ignore[union-attr]  # one
    states = [torch.load(tmp_path / f / "best.ckpt", weights_only=True) for f in ("whole", "parts")]
    assert states[0]["global_step"] == states[1]["global_step"]
    for name, tensor in states[0]["state_dict"].items():
        torch.testing.assert_close(states[1]["state_dict"][name], tensor, rtol=0, atol=0)


def test_a_checkpoint_of_other_parts_is_refused(tmp_path: Path) -> None:
    fit(module(tmp_path, trainable=("router",)), text(), 2)
    for parts, named in ((("experts",), "experts"), (("router", "shared"), "shared_expert")):
        other = module(tmp_path, trainable=parts)
        before = hashes(other.student)
        with pytest.raises(InputError, match=rf"trained other parameters \(such as .*{named}"):
            trainer(4).fit(other, datamodule=text(), ckpt_path=tmp_path / "last.ckpt")
        assert hashes(other.student) == before


def test_a_finished_training_is_not_trained_further(tmp_path: Path) -> None:
    fit(module(tmp_path, **PARTS), text(), 4)
    again = module(tmp_path, **PARTS)
    engine = trainer(4)
    engine.fit(again, datamodule=text(), ckpt_path=tmp_path / "last.ckpt")
    assert engine.global_step == 4
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    name = "student.model.layers.0.mlp.gate.weight"
    torch.testing.assert_close(again.state_dict()[name], state[name], rtol=0, atol=0)


class WriteWeights(Callback):
    """Writes the weights of each process: what forked processes hold is lost."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained = {n: p.detach() for n, p in pl_module.named_parameters() if p.requires_grad}
        torch.save(trained, self._folder / f"{trainer.global_rank}.pt")


def test_two_processes_train_like_one_with_twice_the_batch(tmp_path: Path) -> None:
    alone = module(tmp_path / "one", **PARTS)
    engine, _ = fit(alone, text(batch_size=4), 3, val_check_interval=1)
    both = module(tmp_path / "two", **PARTS)
    fit(
        both,
        text(batch_size=2),
        3,
        val_check_interval=1,
        devices=2,
        strategy="ddp_fork",
        callbacks=[WriteWeights(tmp_path)],
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
            # Adam's first steps divide by the gradient's size, which magnifies its rounding.
            torch.testing.assert_close(first[name], parameter.detach(), rtol=0, atol=2e-4)
    found = torch.load(tmp_path / "two/best.ckpt", weights_only=True)["callbacks"]
    score = next(v["best_model_score"] for k, v in found.items() if "ModelCheckpoint" in k)
    alone_score = engine.checkpoint_callback.best_model_score  # type: ignore[union-attr]  # one
    assert score == pytest.approx(alone_score.item(), rel=1e-3)
