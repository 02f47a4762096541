"""Runs that are killed again and again, each time later, end with the bytes of one that was not."""

import contextlib
import os
import pkgutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from safetensors.torch import save_file
from torch import Tensor

from lightning_smoe.models import shard_writer
from lightning_smoe.models.artifact import replacing
from tests.cli.command import Workplace, snapshot
from tests.training.kills import finish, start

SETTINGS = {"data.calib_tokens": 512, "model.recipe": ...}


class Moment(NamedTuple):
    """When a process is killed: as a function is called for the n-th time.

    Args:
        function: Where it is looked up.
        number: Which call, from 1.
        instead: Does half of the call's work first; none leaves all of it out.
    """

    function: str
    number: int
    instead: Callable[..., None] | None = None


def half_a_file(tensors: dict[str, Tensor], path: Path, **settings: Any) -> None:
    save_file(tensors, path, **settings)
    os.truncate(path, path.stat().st_size // 2)


def half_a_tensor(descriptor: int, place: int, tensor: Tensor) -> None:
    WRITE_AT(descriptor, place, tensor.reshape(-1)[: tensor.numel() // 2])


WRITE_AT = shard_writer._write_at
STATISTICS = "lightning_smoe.calibration.statistics.save_file"
TENSOR = "lightning_smoe.models.shard_writer._write_at"
REPLACE = "pathlib.Path.replace"
# Within the work, within a write, and behind it but before the result is in its place.
IN_MEMORY = {
    "calibrate": (
        Moment("lightning_smoe.calibration.module.CalibrationModule.predict_step", 2),
        Moment(STATISTICS, 1, half_a_file),
    ),
    "plan": (Moment(REPLACE, 2),),
    "compress": (
        Moment("lightning_smoe.compression.module.run_layer", 9),
        Moment(TENSOR, 30, half_a_tensor),
        # The refits' outcomes are in plan.json by then.
        Moment(REPLACE, 1),
    ),
}
STREAMED = {
    "calibrate": (
        Moment("lightning_smoe.calibration.walked.run_layer", 4),
        Moment(STATISTICS, 2, half_a_file),
        Moment("lightning_smoe.models.progress.WalkProgress.close", 1),
    ),
    "plan": (Moment("lightning_smoe.measure.make_plan", 1),),
    "compress": (
        Moment("lightning_smoe.compression.module.run_layer", 9),
        Moment(TENSOR, 20, half_a_tensor),
        Moment("lightning_smoe.results.note_refits", 1),
        Moment("lightning_smoe.models.streamed_folder.StreamedFolder.verify", 1),
        Moment(REPLACE, 1),
        Moment("lightning_smoe.models.progress.WalkProgress.close", 1),
    ),
}


def killed_at(moment: Moment, run: Callable[[], object]) -> None:
    """Runs something in this process until the moment comes."""
    module, name = moment.function.rsplit(".", 1)
    whole = getattr(pkgutil.resolve_name(module), name)
    called = 0

    def deadly(*args: Any, **settings: Any) -> Any:
        nonlocal called
        called += 1
        if called < moment.number:
            return whole(*args, **settings)
        if moment.instead is not None:
            moment.instead(*args, **settings)
        return os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch(moment.function, deadly):
        raise AssertionError(f"{moment} never came: {run()}")


def results(out: Path) -> dict[str, str]:
    """All that is there, hidden files too, but how long it took."""
    dated = ("seconds.json", "config.yaml")
    return {k: v for k, v in snapshot(out).items() if k not in dated}


@pytest.fixture(scope="module")
def expected(
    new_workplace: Callable[[Path, str], Workplace], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What an experiment gives that nothing kills."""
    work = new_workplace(tmp_path_factory.mktemp("whole") / "work", "qwen2_moe")
    work.write(SETTINGS)
    work.done("compress")
    return results(work.out)


@pytest.mark.parametrize(("stream", "moments"), [("false", IN_MEMORY), ("true", STREAMED)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    stream: str, moments: dict[str, tuple[Moment, ...]], work: Workplace, expected: dict[str, str]
) -> None:
    work.write(SETTINGS)
    words = ("--model.stream", stream)
    for verb, each in moments.items():
        for moment in each:
            run = partial(work.do, verb, *words)
            codes = finish([start(partial(killed_at, moment, run))])
            assert codes == [-signal.SIGKILL], (verb, moment)
        work.done(verb, *words)
    assert results(work.out) == expected


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_folder_that_was_set_aside_when_a_run_was_killed_is_not_lost(
    ends: str, tmp_path: Path
) -> None:
    path, aside = tmp_path / "compressed", tmp_path / ".compressed.old"
    aside.mkdir()
    (aside / "weights").write_text("old")
    (tmp_path / ".compressed.partial").mkdir()
    with contextlib.suppress(InterruptedError), replacing(path) as partial:
        assert (path / "weights").read_text() == "old"
        partial.mkdir()
        (partial / "weights").write_text("new")
        if ends == "badly":
            raise InterruptedError
    assert [*tmp_path.iterdir()] == [path]
    assert (path / "weights").read_text() == ("new" if ends == "well" else "old")
