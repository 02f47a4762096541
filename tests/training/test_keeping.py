"""Which checkpoints a training leaves, and when it stops."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_smoe.errors import InputError
from lightning_smoe.training.keeping import (
    LastCheckpoint,
    checkpoint_bytes,
    checkpoint_callbacks,
    relocate,
)
from lightning_smoe.training.random_state import RandomState
from tests.training.line import Line, line_trainer
from tests.training.students import QUIET

pytestmark = QUIET


class Saves(Callback):
    """Notes (step, batch) at which each file was written."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        self.found.append((trainer.global_step, trainer.fit_loop.total_batch_idx + 1))


def saves(folder: Path, every_n_steps: int | None, max_steps: int, **options: Any) -> list[Any]:
    note = Saves()
    callbacks = [note, LastCheckpoint(folder, every_n_steps)]
    line_trainer(max_steps, folder, callbacks=callbacks, **options).fit(Line())
    return note.found


def test_the_newest_is_written_between_steps_and_after_validations(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "val_check_interval": 6}
    # (step, batch); an epoch has eight batches, and the write at its end waits a step.
    assert saves(tmp_path, None, 9, **options) == [(3, 6), (6, 12), (9, 18)]
    assert saves(tmp_path, 2, 9, **options) == [(2, 4), (3, 6), (5, 10), (6, 12), (9, 18)]
    expected = [(step, 2 * step) for step in range(1, 10) if step not in (4, 8)]
    assert saves(tmp_path, 1, 9, **options) == expected


def test_a_resumed_training_writes_where_the_whole_one_does(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 4, "val_check_interval": 16}
    note = Saves()
    line_trainer(1, tmp_path, callbacks=[LastCheckpoint(tmp_path, 1)], **options).fit(Line())
    trainer = line_trainer(5, tmp_path, callbacks=[note, LastCheckpoint(tmp_path, 1)], **options)
    trainer.fit(Line(), ckpt_path=tmp_path / "last.ckpt")
    assert note.found == [(3, 12), (4, 16), (5, 20)]


@pytest.mark.parametrize("every", [1, 3])
def test_the_best_is_kept_and_the_newest_knows_of_it(every: int, tmp_path: Path) -> None:
    callbacks = checkpoint_callbacks(tmp_path, every)
    line_trainer(8, tmp_path, callbacks=callbacks).fit(Line((9, 9, 3, 9, 1, 9, 2, 9, 4)))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    best, last = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("best", "last"))
    assert (best["global_step"], last["global_step"]) == (4, 8)
    (state,) = [v for name, v in last["callbacks"].items() if name.startswith("ModelCheckpoint")]
    assert state["best_model_score"] == 1


def test_training_stops_after_validations_without_improvement(tmp_path: Path) -> None:
    scores = (9, 9, 3, 9, 4, 9, 3, 9, 1)
    for patience, steps in ((1, 4), (2, 6), (3, 12)):
        callbacks = checkpoint_callbacks(tmp_path / str(patience), 1, patience)
        trainer = line_trainer(12, tmp_path, callbacks=callbacks)
        trainer.fit(Line(scores))
        assert trainer.global_step == steps


def resumed(folder: Path, patience: int, scores: tuple[float, ...]) -> Trainer:
    trainer = line_trainer(12, folder, callbacks=checkpoint_callbacks(folder, 1, patience))
    trainer.fit(Line(scores), ckpt_path=folder / "last.ckpt")
    return trainer


def test_what_had_stopped_itself_stays_so_unless_patience_grows(tmp_path: Path) -> None:
    scores = (9, 9, 3, 9, 4, 9, 3, 9, 5, 9, 5)
    callbacks = checkpoint_callbacks(tmp_path, 1, 2)
    line_trainer(12, tmp_path, callbacks=callbacks).fit(Line(scores))
    assert resumed(tmp_path, 2, scores).global_step == 6
    assert resumed(tmp_path, 3, scores).global_step == 8
    assert resumed(tmp_path, 1, scores).global_step == 8
    assert resumed(tmp_path, 5, scores).global_step == 12


def test_patience_that_was_used_is_not_given_again(tmp_path: Path) -> None:
    scores = (9, 9, 3, 9, 4, 9, 3, 9, 5)
    line_trainer(5, tmp_path, callbacks=checkpoint_callbacks(tmp_path, 1, 2)).fit(Line(scores))
    assert resumed(tmp_path, 2, scores).global_step == 6


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 3},
        {"val_check_interval": 0.25, "check_val_every_n_epoch": 1, "accumulate_grad_batches": 4},
        {"val_check_interval": 6, "accumulate_grad_batches": 3},
    ],
)
def test_a_validation_within_a_step_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    settings = {"accumulate_grad_batches": 2, "callbacks": [LastCheckpoint(tmp_path)], **options}
    with pytest.raises(InputError, match=r"validation every . batches, in epochs of 8, falls into"):
        line_trainer(4, tmp_path, **settings).fit(Line())


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 3, "limit_val_batches": 0},
        {"val_check_interval": 1.0, "check_val_every_n_epoch": 1, "accumulate_grad_batches": 3},
        {"val_check_interval": 0.5, "check_val_every_n_epoch": 1},
    ],
)
def test_validations_between_steps_are_not_refused(options: dict[str, Any], tmp_path: Path) -> None:
    settings = {"accumulate_grad_batches": 2, "callbacks": [LastCheckpoint(tmp_path)], **options}
    line_trainer(1, tmp_path, **settings).fit(Line())


def test_both_act_at_the_validation_also_where_that_ends_an_epoch(tmp_path: Path) -> None:
    callbacks = checkpoint_callbacks(tmp_path, None, 1)
    options = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    trainer = line_trainer(40, tmp_path, callbacks=[*callbacks, RandomState()], **options)
    trainer.fit(Line((1,)))
    assert trainer.global_step == 16
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    states = {name.split("{")[0]: value for name, value in last["callbacks"].items()}
    assert states["EarlyStopping"]["wait_count"] == 1
    assert states["ModelCheckpoint"]["best_model_score"] == 1


def test_the_size_of_a_checkpoint_is_known_before_training(tmp_path: Path) -> None:
    module = Line()
    module.big = torch.nn.Linear(300, 300)
    module.frozen = torch.nn.Linear(300, 300).requires_grad_(False)
    size = checkpoint_bytes(module)
    assert size == 3 * 4 * (4 + 1 + 300 * 300 + 300)
    callbacks: list[Callback] = [RandomState(), LastCheckpoint(tmp_path)]
    del module.frozen
    line_trainer(2, tmp_path, callbacks=callbacks).fit(module)
    found = (tmp_path / "last.ckpt").stat().st_size
    unused = 2 * 4 * (300 * 300 + 300)
    assert size - unused < found < size - unused + 40_000


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0 must be 1 or more"),
        ({"patience": 0}, "patience=0 must be 1 or more"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        checkpoint_callbacks(Path("folder"), **options)


def test_lightnings_own_callbacks_do_the_keeping() -> None:
    stopping, best, last = checkpoint_callbacks(Path("folder"), 1, 1)
    assert isinstance(stopping, EarlyStopping)
    assert isinstance(best, ModelCheckpoint)
    assert isinstance(last, LastCheckpoint)


def kept(score: float | None) -> dict[str, Any]:
    """A checkpoint as Lightning leaves it in a folder that is elsewhere now."""
    models = {} if score is None else {"/old/best.ckpt": torch.tensor(score)}
    state = {
        "dirpath": "/old",
        "best_model_path": "/old/best.ckpt",
        "kth_best_model_path": "/old/best.ckpt",
        "best_k_models": models,
        "best_model_score": None if score is None else torch.tensor(score),
        "kth_value": torch.tensor(torch.inf if score is None else score),
    }
    return {"callbacks": {"ModelCheckpoint{}": state, "Other": {"dirpath": "/old"}}}


@pytest.mark.parametrize("score", [0.5, None])
@pytest.mark.parametrize("is_there", [True, False])
def test_the_best_checkpoint_is_that_of_the_folder_or_none(
    score: float | None, is_there: bool, tmp_path: Path
) -> None:
    if is_there:
        (tmp_path / "best.ckpt").touch()
    checkpoint = kept(score)
    relocate(checkpoint, tmp_path)
    best = ModelCheckpoint(tmp_path, "best", monitor="valid/kl")
    best.load_state_dict(checkpoint["callbacks"]["ModelCheckpoint{}"])
    is_known = is_there and score is not None
    assert best.best_model_path == (str(tmp_path.resolve() / "best.ckpt") if is_known else "")
    assert best.best_model_score == (score if is_known else None)
    assert len(best.best_k_models) == is_known
    assert checkpoint["callbacks"]["Other"] == {"dirpath": "/old"}
