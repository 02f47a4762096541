"""Running the command line as a user does, within the test process, and what a folder holds."""

import copy
import hashlib
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import yaml

from lightning_smoe.cli import main

EXPERIMENT_VERBS = ("calibrate", "plan", "compress", "fit", "evaluate")
LOOKING_VERBS = ("inspect", "generate", "compare")
VERBS = (*EXPERIMENT_VERBS, "sweep", *LOOKING_VERBS)

# A whole experiment in a second: names of folders are relative to the experiment's own. Pruning,
# because its results are stock checkpoints; the default recipe has tests of its own.
EXPERIMENT: dict[str, Any] = {
    "model": {
        "checkpoint": "model",
        "output_dir": "out",
        "keep": 6,
        "recipe": {"class_path": "lightning_smoe.compression.recipe.Prune"},
        # It has tests of its own.
        "recovery": {"layerwise": None},
    },
    "data": {
        "path": "text",
        "sequence_length": 64,
        "batch_size": 4,
        "calib_tokens": 1024,
        "valid_tokens": 512,
        "test_tokens": 512,
    },
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 4,
        "val_check_interval": 2,
        "logger": False,
        "enable_progress_bar": False,
    },
}


# What Lightning 2.6 calls and jsonargparse 4 deprecates; a user does not see the warnings.
QUIET = {"JSONARGPARSE_DEPRECATION_WARNINGS": "off"}


class Outcome(NamedTuple):
    """What a command ended with."""

    code: int
    out: str
    err: str


class Workplace:
    """A folder with a checkpoint `model`, some `text` and an `experiment.yaml`.

    Args:
        folder: The folder; commands run in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def out(self) -> Path:
        """The experiment's output folder."""
        return self.folder / "out"

    def write(self, changes: Mapping[str, Any]) -> None:
        """Writes the experiment file with other values at dotted keys; a `...` takes one out."""
        experiment = copy.deepcopy(EXPERIMENT)
        for key, value in changes.items():
            *parents, last = key.split(".")
            section = experiment
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
            if value is ...:
                del section[last]
        (self.folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))

    def run(self, *words: str | Path) -> Outcome:
        """Runs a command line as it stands."""
        return run_in(self.folder, main, *words)

    def do(self, verb: str, *words: str | Path) -> Outcome:
        """Runs a verb on the experiment file, with further options."""
        return self.run(verb, "--config", "experiment.yaml", *words)

    def done(self, verb: str, *words: str | Path) -> Outcome:
        """The same, where success is expected."""
        outcome = self.do(verb, *words)
        assert outcome.code == 0, outcome.err
        return outcome

    def refused(self, match: str, verb: str, *words: str | Path) -> str:
        """The same, where exactly one message and no change on disk is expected."""
        before = snapshot(self.folder)
        outcome = self.do(verb, *words)
        assert snapshot(self.folder) == before
        return check_refusal(outcome, match)


def run_in(folder: Path, command: Callable[[list[str]], None], *words: str | Path) -> Outcome:
    """Runs the main function of a program in a folder."""
    out, err = io.StringIO(), io.StringIO()
    before, handler = Path.cwd(), signal.getsignal(signal.SIGTERM)
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch.dict(os.environ, QUIET),
        mock.patch.object(sys, "argv", ["lightning_smoe"]),
        _own_logger(),
    ):
        os.chdir(folder)
        try:
            command([str(word) for word in words])
            code: Any = 0
        except SystemExit as end:
            code = end.code
        finally:
            os.chdir(before)
            signal.signal(signal.SIGTERM, handler)
    return Outcome(code, out.getvalue(), err.getvalue())


def check_refusal(outcome: Outcome, match: str) -> str:
    """Checks that a command ended with code 2 and one message, and returns the message."""
    assert outcome.code == 2, outcome
    _, *messages = re.split(r"^error: ", outcome.err, flags=re.MULTILINE)
    assert len(messages) == 1, outcome.err
    assert "Traceback" not in outcome.err
    message = messages[0]
    assert re.search(match, message), message
    return message


@contextmanager
def _own_logger() -> Iterator[None]:
    """Undoes what the command line does to the project's logger."""
    log = logging.getLogger("lightning_smoe")
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    try:
        yield
    finally:
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


def snapshot(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, by its path; folders have none."""
    return {
        str(path.relative_to(folder)): hash_of(path) if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def hash_of(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
