"""What a checkpoint is when writing it fails, and what loading one may do."""

import errno
import multiprocessing
import os
import pickle
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from lightning_smoe.errors import InputError
from lightning_smoe.training.checkpoint_io import AtomicCheckpointIO

LARGE = {"weights": torch.arange(100_000, dtype=torch.float32), "step": 2}
SMALL = {"weights": torch.ones(3), "step": 1}


def load(path: Path) -> dict[str, Any]:
    return AtomicCheckpointIO().load_checkpoint(path)


def exit_code(work: Callable[[], None]) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(LARGE, path)
    found = load(path)
    assert found["step"] == 2
    torch.testing.assert_close(found["weights"], LARGE["weights"], rtol=0, atol=0)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_leaves_the_checkpoint_before_and_says_what_happened(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(SMALL, path)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        with pytest.raises(OSError, match=r"File too large; the checkpoint before it is kept") as e:
            AtomicCheckpointIO().save_checkpoint(LARGE, path)
        assert (e.value.errno, e.value.filename) == (errno.EFBIG, str(path))

    assert exit_code(fill) == 0
    assert load(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


class Full:
    """A file on a disk with so many free bytes."""

    def __init__(self, file: IO[bytes], free: int) -> None:
        self._file = file
        self._free = free

    def write(self, data: Any) -> int:
        if len(data) > self._free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._free -= len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


@pytest.mark.parametrize("free", [0, 1000, 399_000, 400_400])
def test_wherever_the_disk_is_full_the_checkpoint_before_is_whole(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(SMALL, path)
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: save(state, Full(file, free)))  # type: ignore[arg-type]  # write and flush are all it uses
    with pytest.raises(OSError, match="No space left on device") as error:
        AtomicCheckpointIO().save_checkpoint(LARGE, path)
    assert error.value.errno == errno.ENOSPC
    assert load(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_killed_save_leaves_the_checkpoint_before_and_the_next_save_tidies_up(
    tmp_path: Path,
) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(SMALL, path)

    def die(_: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", die)
            AtomicCheckpointIO().save_checkpoint(LARGE, path)

    assert exit_code(save) == -signal.SIGKILL
    assert load(path)["step"] == 1
    assert len(list(tmp_path.iterdir())) == 2
    AtomicCheckpointIO().save_checkpoint(LARGE, path)
    assert load(path)["step"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_bytes_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    synced: list[tuple[str, bool]] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        synced.append((name, path.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    AtomicCheckpointIO().save_checkpoint(SMALL, path)
    assert synced == [(".last.ckpt.partial", False), (tmp_path.name, True)]


class Code:
    """Pickles as a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("weights_only", [None, False, True])
def test_code_in_a_checkpoint_is_not_run(
    weights_only: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": Code()}, path)
    with pytest.raises(InputError, match="no whole checkpoint of tensors and numbers"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=weights_only)
    path.write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(InputError, match="no whole checkpoint of tensors and numbers"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=weights_only)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("length", [0, 100, 300_000])
def test_a_damaged_checkpoint_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(LARGE, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"last.ckpt is no whole checkpoint .*start afresh"):
        load(path)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt"):
        load(tmp_path / "last.ckpt")


def test_options_of_remote_storage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoints are kept locally"):
        AtomicCheckpointIO().save_checkpoint(SMALL, tmp_path / "last.ckpt", {"key": "secret"})
