"""Output folders that cannot be written: taken, in the way, held by another run, or full."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_smoe.models.artifact import locked
from tests.cli.command import Workplace, check_refusal, snapshot
from tests.training.kills import start

MEGABYTE = 1 << 20


def test_output_in_the_way_of_something_is_refused(work: Workplace) -> None:
    (work.folder / "note.txt").write_text("mine")
    for folder, match in (
        ("note.txt", r"note\.txt is a file; name a folder"),
        ("note.txt/out", r"note\.txt is a file; name a folder"),
        ("model", r"model\.output_dir=model lies in the original; name another folder"),
        ("model/deep/out", r"lies in the original; name another folder"),
        ("out/../model/out", r"lies in the original; name another folder"),
    ):
        work.refused(match, "plan", f"--model.output_dir={folder}")


def test_output_behind_a_link_into_the_original_is_refused(work: Workplace) -> None:
    (work.folder / "link").symlink_to(work.folder / "model")
    work.refused(r"lies in the original", "plan", "--model.output_dir=link/out")


def test_a_run_never_replaces_its_own_original(finished: Workplace) -> None:
    for part in ("compressed", "recovered"):
        match = rf"would replace the original, out/{part}; name another folder"
        words = [f"--model.checkpoint=out/{part}", "--model.keep=4", "--model.overwrite=true"]
        finished.refused(match, "compress", *words)
    finished.done("calibrate", *words, "--model.output_dir=again")


def test_a_folder_of_a_person_is_not_replaced(work: Workplace) -> None:
    (work.out / "compressed").mkdir(parents=True)
    (work.out / "compressed/thesis.txt").write_text("three years of work")
    outcome = work.do("compress")
    check_refusal(outcome, r"compressed holds the result of another run; name another model\.out")
    assert (work.out / "compressed/thesis.txt").read_text() == "three years of work"


def test_another_run_s_result_is_not_replaced(finished: Workplace) -> None:
    (finished.out / "plan.json").unlink()
    (finished.out / "statistics.safetensors").unlink()
    before = snapshot(finished.out / "compressed")
    outcome = finished.do("fit", "--model.keep=7")
    check_refusal(outcome, r"compressed holds the result of another run \(different: plan")
    assert snapshot(finished.out / "compressed") == before


def test_damaged_results_are_named_and_overwrite_replaces_them(finished: Workplace) -> None:
    (finished.out / "statistics.safetensors").write_bytes(b"garbage")
    match = r"statistics\.safetensors is damaged .*; delete it and calibrate again"
    finished.refused(match, "fit")
    told = finished.done("calibrate", "--model.overwrite=true").err
    assert "calibrate: wrote" in told


def test_a_damaged_compressed_model_is_named(finished: Workplace) -> None:
    shutil.rmtree(finished.out / "recovered")
    weights = finished.out / "compressed/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    before = snapshot(finished.out / "compressed")
    for verb in ("evaluate", "fit"):
        check_refusal(finished.do(verb), r"compressed/model\.safetensors is truncated or damaged")
    assert snapshot(finished.out / "compressed") == before


def test_a_folder_that_this_process_holds_is_refused(work: Workplace) -> None:
    with locked(work.out):
        match = r"another run is writing to out; wait for it, or name another model\.output_dir"
        work.refused(match, "plan")
        work.done("plan", "--model.output_dir=other")
    work.done("plan")


def test_a_folder_that_another_process_holds_is_free_when_that_is_killed(work: Workplace) -> None:
    reader, writer = os.pipe()

    def hold() -> None:
        with locked(work.out):
            os.write(writer, b"held")
            signal.pause()

    holder = start(hold)
    assert os.read(reader, 4) == b"held"
    work.refused(r"another run is writing to out", "plan")
    holder.kill()
    holder.join()
    work.done("plan")


def test_a_disk_without_room_for_the_model_is_refused(
    work: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    work.done("plan")
    before = snapshot(work.out)
    usage: Any = shutil.disk_usage(work.out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    outcome = work.do("compress")
    check_refusal(outcome, r"no space is left on the disk: .*; free some, or name another model\.o")
    assert snapshot(work.out) == before


@pytest.fixture
def small_disk(work: Workplace) -> Iterator[Path]:
    """A disk of three megabytes at the experiment's output folder."""
    work.out.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root mounts a disk")
    command = [mount, "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(work.out)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let root mount a disk")
    yield work.out
    # Lazily: weights may still be mapped into this process.
    subprocess.run([str(shutil.which("umount")), "--lazy", str(work.out)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Fills a disk up to some bytes."""
    blob = disk / "blob"
    blob.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return blob


@pytest.mark.parametrize(
    ("done", "verb", "left"),
    [
        (None, "calibrate", 4096),
        ("calibrate", "plan", 0),
        pytest.param("plan", "compress", MEGABYTE // 2, marks=pytest.mark.slow),
        pytest.param("compress", "fit", 0, marks=pytest.mark.slow),
        pytest.param("compress", "fit", MEGABYTE // 2, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_ends_with_one_message_and_nothing_half(
    done: str | None, verb: str, left: int, work: Workplace, small_disk: Path
) -> None:
    if done is not None:
        work.done(done)
    before = results(small_disk)
    blob = fill(small_disk, left)
    check_refusal(work.do(verb), r"no space is left on the disk")
    assert results(small_disk) == before
    blob.unlink()
    if verb != "fit":
        work.done(verb)


def results(disk: Path) -> dict[str, str]:
    """All that is there but a training to be continued and the times that steps took."""
    others = ("blob", ".lock", "seconds.json", "training")
    return {k: v for k, v in snapshot(disk).items() if k.split("/")[0] not in others}
