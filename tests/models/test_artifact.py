"""Files that are whole or absent, and know what made them."""

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_smoe.errors import InputError
from lightning_smoe.models import artifact
from lightning_smoe.models.artifact import (
    Manifest,
    is_current,
    locked,
    replacing,
    require_space,
    sha256_of,
    sha256_of_file,
    write_json,
)
from tests.models.pruning import contents, full_disk

MANIFEST = Manifest("plan", {"keep": 8, "text": "abc"})


def write_folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / "weights").write_text(text)


def write_file(path: Path, text: str) -> None:
    path.write_text(text)


WRITERS = pytest.mark.parametrize("write", [write_file, write_folder])
Write = Callable[[Path, str], None]


def read(path: Path) -> str:
    return (path / "weights" if path.is_dir() else path).read_text()


@WRITERS
def test_a_finished_artifact_takes_the_place_of_the_old_one(tmp_path: Path, write: Write) -> None:
    target = tmp_path / "result"
    for text in ("old", "new"):
        with replacing(target) as partial:
            write(partial, text)
            assert not target.exists() or read(target) == "old"
        assert read(target) == text
    assert list(tmp_path.iterdir()) == [target]


def break_off(target: Path, write: Write, error: type[BaseException]) -> None:
    with replacing(target) as partial:
        write(partial, "half")
        raise error("half of it is written")


@WRITERS
@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_what_fails_or_is_interrupted_leaves_the_old_artifact_alone(
    tmp_path: Path, write: Write, error: type[BaseException]
) -> None:
    target = tmp_path / "result"
    write(target, "old")
    with pytest.raises(error):
        break_off(target, write, error)
    assert read(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


@WRITERS
def test_what_fails_where_nothing_was_leaves_nothing(tmp_path: Path, write: Write) -> None:
    with pytest.raises(OSError, match="half"):
        break_off(tmp_path / "result", write, OSError)
    assert not list(tmp_path.iterdir())


@WRITERS
def test_the_old_artifact_survives_an_interrupt_while_it_is_replaced(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "result"
    write(target, "old")
    rename = Path.replace

    def interrupted(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(target) as partial:
        write(partial, "new")
    assert read(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


@WRITERS
def test_what_a_killed_run_left_behind_is_cleared_away(tmp_path: Path, write: Write) -> None:
    target = tmp_path / "result"
    with replacing(target) as partial:
        place = partial
        write(partial, "first")
    write_folder(place, "left behind")
    with replacing(target) as partial:
        assert not partial.exists()
        write(partial, "new")
    assert read(target) == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_takes_the_place_of_a_link_and_spares_what_it_points_to(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", "precious")
    target = tmp_path / "result"
    target.symlink_to(tmp_path / "elsewhere")
    with replacing(target) as partial:
        write_folder(partial, "new")
    assert read(target) == "new"
    assert read(tmp_path / "elsewhere") == "precious"


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b" / "c.json", {"text": "\u00f1"})
    assert (tmp_path / "a/b/c.json").read_text("utf-8") == '{\n "text": "\u00f1"\n}\n'


def test_json_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from lightning_smoe.models.artifact import write_json; "
        "write_json(Path(sys.argv[1]), chr(0xf1))"
    )
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    root = Path(artifact.__file__).parents[2]
    command = [sys.executable, "-c", code, str(tmp_path / "x.json")]
    subprocess.run(command, env=environment, cwd=root, check=True)
    assert (tmp_path / "x.json").read_bytes() == '"\u00f1"\n'.encode()


def test_the_digest_depends_on_step_and_inputs_alone() -> None:
    reordered = Manifest("plan", {"text": "abc", "keep": 8}, {"torch": "1.0"})
    assert reordered.digest == MANIFEST.digest
    assert Manifest("fit", MANIFEST.inputs).digest != MANIFEST.digest
    assert Manifest("plan", {**MANIFEST.inputs, "keep": 9}).digest != MANIFEST.digest


def test_a_manifest_names_the_versions_that_wrote_it() -> None:
    assert set(MANIFEST.versions) == {"lightning-smoe", "torch", "transformers", "lightning"}


def test_a_manifest_comes_back_from_json() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    assert MANIFEST.to_json()["digest"] == MANIFEST.digest
    assert Manifest.from_json(None) is None


def test_hashes_are_those_of_sha256(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"abc" * 1_000_000)  # more than one block
    # From coreutils: printf '"abc"' | sha256sum.
    expected = "6cc43f858fbb763301637b5af970e2a46b46f461f27e5a0f41e009c59b827b25"
    assert sha256_of("abc") == expected
    command = ["sha256sum", str(file)]
    shown = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert sha256_of_file(file) == shown.split()[0]


def test_what_is_not_there_is_not_current(tmp_path: Path) -> None:
    assert not is_current(tmp_path / "plan.json", None, MANIFEST, overwrite=False)


def test_what_may_be_overwritten_is_not_current(tmp_path: Path) -> None:
    assert not is_current(tmp_path, MANIFEST, MANIFEST, overwrite=True)


def test_what_was_made_from_the_same_inputs_is_current(tmp_path: Path) -> None:
    older = Manifest(MANIFEST.step, dict(MANIFEST.inputs), {"torch": "1.0"})
    assert is_current(tmp_path, older, MANIFEST, overwrite=False)


def test_what_was_made_from_other_inputs_is_refused_and_the_inputs_named(tmp_path: Path) -> None:
    found = Manifest("plan", {"keep": 9, "text": "abc", "seed": 1})
    message = (
        rf"^{tmp_path} holds the result of another run \(different: keep, seed\); "
        r"name another model\.output_dir, or set model\.overwrite to true"
    )
    with pytest.raises(InputError, match=message):
        is_current(tmp_path, found, MANIFEST, overwrite=False)


def test_what_nobody_signed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds the result of another run; name another"):
        is_current(tmp_path, None, MANIFEST, overwrite=False)


def test_a_second_run_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with locked(folder):
        message = rf"another run is writing to {folder}; wait for it, or name another"
        with pytest.raises(InputError, match=message), locked(folder):
            pass
    with locked(folder):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; "
        "from lightning_smoe.models.artifact import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    root = Path(artifact.__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another run is writing"), locked(tmp_path):
            pass
        process.kill()
    with locked(tmp_path):
        pass


def test_an_error_inside_the_lock_is_not_taken_for_a_second_run(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="mine"), locked(tmp_path):
        raise BlockingIOError("mine")
    with locked(tmp_path):
        pass


def test_what_does_not_fit_the_disk_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_space(tmp_path / "not" / "there", 1)
    monkeypatch.setattr(shutil, "disk_usage", full_disk)
    require_space(tmp_path / "not" / "there", 0)
    message = r"not/there needs 2\.50 GB and the disk has 0\.00 GB free"
    with pytest.raises(OSError, match=message) as caught:
        require_space(tmp_path / "not" / "there", 2_500_000_000)
    assert caught.value.errno == errno.ENOSPC
    assert not contents(tmp_path)
