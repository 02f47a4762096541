"""The validation curve."""

import json
from pathlib import Path
from typing import Any

from lightning_smoe.training.curve import Curve
from lightning_smoe.training.keeping import LastCheckpoint
from lightning_smoe.training.random_state import RandomState
from tests.training.line import Line, line_trainer

SCORES = (1.0, 0.9, 0.75, 0.7, 0.5, 0.4, 0.25)
# Sequences have 3 and 4 tokens by turns.
WHOLE = [
    {"step": 0, "tokens": 0, "valid/kl": 1.0},
    {"step": 2, "tokens": 7, "valid/kl": 0.75},
    {"step": 4, "tokens": 14, "valid/kl": 0.5},
    {"step": 6, "tokens": 21, "valid/kl": 0.25},
]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_each_validation_is_a_point_and_the_start_is_the_first(tmp_path: Path) -> None:
    curve = Curve(tmp_path / "curve.json")
    trainer = line_trainer(6, tmp_path, callbacks=[curve], enable_checkpointing=False)
    module = Line(SCORES)
    trainer.validate(module, verbose=False)
    assert read(tmp_path / "curve.json") == WHOLE[:1]
    trainer.fit(module)
    assert read(tmp_path / "curve.json") == curve.points == WHOLE
    trainer.validate(module, verbose=False)
    assert curve.points == WHOLE


def test_the_curve_is_whole_after_a_resume_and_forgets_what_was_lost(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"

    def run(max_steps: int, ckpt_path: Path | None) -> None:
        keeping = [Curve(path), RandomState(), LastCheckpoint(tmp_path, 3)]
        trainer = line_trainer(max_steps, tmp_path, callbacks=keeping)
        module = Line(SCORES)
        trainer.validate(module, verbose=False)
        trainer.fit(module, ckpt_path=ckpt_path)

    run(4, None)
    first = (tmp_path / "last.ckpt").read_bytes()
    run(6, tmp_path / "last.ckpt")
    assert read(path) == WHOLE
    (tmp_path / "last.ckpt").write_bytes(first)
    run(4, tmp_path / "last.ckpt")
    assert read(path) == WHOLE[:3]
