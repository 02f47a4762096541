"""A limit on the size of files, in the place of a disk that fills while it is written to."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.command import Workplace, check_refusal, snapshot

FULL = r"no space is left on the disk: .*; free some, or name another model\.output_dir"


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """Lets no file of this process grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Writing beyond it is an error then, and not the end.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("stream", [False, True])
def test_files_that_cannot_grow_end_with_one_message_and_nothing_half(
    stream: bool, work: Workplace
) -> None:
    words = (f"--model.stream={str(stream).lower()}", "--model.recipe.refit=null")
    for done, verb, limit, option in (
        (None, "calibrate", 20_000, "--model.overwrite=false"),
        ("plan", "compress", 200_000, "--model.overwrite=false"),
        ("compress", "compress", 200_000, "--model.overwrite=true"),
    )[: 2 if stream else 3]:
        if done is not None:
            work.done(done, *words)
        before = results(work)
        with files_limited_to(limit):
            outcome = work.do(verb, *words, option)
        check_refusal(outcome, FULL)
        assert results(work) == before


def results(work: Workplace) -> dict[str, str]:
    """All that is there but the lock, times of steps, and what is gone on with."""
    there = snapshot(work.out) if work.out.exists() else {}
    return {k: v for k, v in there.items() if k != "seconds.json" and not k.startswith(".")}


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="there is no place that refuses root too")
def test_a_place_that_cannot_be_written_ends_with_one_message(work: Workplace) -> None:
    outcome = work.do("calibrate", "--model.output_dir=/sys/lightning_smoe")
    check_refusal(
        outcome, r"the disk refuses: .*/sys/lightning_smoe'; change what is there, or name"
    )


@pytest.mark.parametrize("name", ["statistics.safetensors", "plan.json", "seconds.json"])
def test_a_folder_in_the_place_of_a_file_ends_with_one_message(name: str, work: Workplace) -> None:
    (work.out / name / "mine").mkdir(parents=True)
    outcome = work.do("plan")
    assert outcome.code == 2, outcome
    check_refusal(outcome, name.split(".", maxsplit=1)[0])
    assert (work.out / name / "mine").is_dir()
