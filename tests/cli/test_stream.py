"""Experiments on models that do not fit in memory: the same results, a decoder layer at a time."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_smoe.models import room
from tests.cli.command import Workplace
from tests.cli.two_processes import do_in_two

SAME = ("statistics.safetensors", "plan.json", "plan.safetensors")
SMALL = {"model.recipe": ..., "data.calib_tokens": 512}


def results(out: Path) -> dict[str, bytes]:
    """What an experiment wrote, but for how long it took."""
    folders = (out, out / "compressed")
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    dated = ("seconds.json", "report.json", "report.md", "config.yaml", ".lock")
    return {str(f.relative_to(out)): f.read_bytes() for f in files if f.name not in dated}


def judged(out: Path) -> Any:
    """What the report says, but for how long it took."""
    report = json.loads((out / "report.json").read_text())
    return {
        name: {k: v for k, v in found.items() if k not in ("seconds", "path")}
        for name, found in {"teacher": report["teacher"], **report["models"]}.items()
    }


def test_every_result_is_the_same_however_the_model_is_held(work: Workplace) -> None:
    work.write(SMALL)
    for folder, streams in (("whole", "false"), ("walked", "true")):
        work.done("evaluate", "--model.output_dir", folder, "--model.stream", streams)
    whole, walked = work.folder / "whole", work.folder / "walked"
    assert results(walked).keys() >= {*SAME, "compressed/model.safetensors"}
    assert results(walked) == results(whole)
    assert judged(walked) == judged(whole)
    assert not [path for path in walked.iterdir() if path.name.startswith(".") and path.is_dir()]


def test_a_model_without_room_is_streamed_and_the_log_says_so(
    work: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "available_memory", lambda _device: 1000)
    told = work.done("calibrate").err
    assert "model.stream: two models take" in told
    assert "calibrate: decoder layer 2; 3 of 3" in told
    monkeypatch.undo()
    assert "statistics.safetensors is there already" in work.done("calibrate").err


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("sweep", ("--recipes", "reap", "--keep", "6"), "hold whole models in memory"),
        ("compress", ("--model.recipe", "auto"), "hold whole models in memory"),
        ("evaluate", ("--tasks", "arc_easy"), "judge it on tasks where it fits in memory"),
    ],
)
def test_what_needs_whole_models_is_refused_before_work(
    work: Workplace, verb: str, words: tuple[str, ...], message: str
) -> None:
    outcome = work.do(verb, "--model.stream", "true", *words)
    assert outcome.code == 2
    assert message in outcome.err.replace("\n", " ")
    assert not work.out.exists()


@pytest.mark.slow
def test_two_processes_share_the_text_of_each_layer_and_write_once(work: Workplace) -> None:
    work.write(SMALL)
    for folder, streams in (("whole", "false"), ("walked", "true")):
        words = ("--model.output_dir", folder, "--model.stream", streams)
        outcomes = do_in_two(work, "evaluate", *words)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err
    whole, walked = work.folder / "whole", work.folder / "walked"
    assert results(walked) == results(whole)
    assert judged(walked) == judged(whole)
