"""Files that are whole or absent, know what made them, and are not made twice."""

import errno
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_smoe.errors import InputError

_LIBRARIES = ("lightning-smoe", "torch", "transformers", "lightning")
_BLOCK = 1 << 20


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class Manifest:
    """What made an artifact.

    Args:
        step: The verb that wrote it.
        inputs: Hashes and settings that decide its content.
        versions: Versions of the libraries that wrote it; they do not decide whether it is current.
    """

    step: str
    inputs: dict[str, Any]
    versions: dict[str, str] = field(default_factory=_versions)

    @property
    def digest(self) -> str:
        """Hash of the step and its inputs."""
        return sha256_of({"step": self.step, "inputs": self.inputs})

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest as it stands in a file."""
        return {**asdict(self), "digest": self.digest}

    @staticmethod
    def from_json(stored: Any) -> "Manifest | None":
        """Reads a manifest back; none stays none.

        Raises:
            ValueError: It is damaged.
        """
        if stored is None:
            return None
        kinds = {"step": str, "inputs": dict, "versions": dict}
        if not isinstance(stored, dict) or not all(
            isinstance(stored.get(key), kind) for key, kind in kinds.items()
        ):
            raise ValueError(f"its manifest needs {', '.join(kinds)}")
        return Manifest(**{key: stored[key] for key in kinds})


def sha256_of(value: Any) -> str:
    """Hash of a value that JSON can hold, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor], beside: Any = None) -> str:
    """Hash of tensors, their names, types and shapes, and of a value that JSON can hold.

    Args:
        tensors: Tensors on the CPU.
        beside: What else must not change.
    """
    digest = hashlib.sha256(sha256_of(beside).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()


def is_current(path: Path, found: Manifest | None, wanted: Manifest, overwrite: bool) -> bool:
    """Says whether an artifact is there already and made from the same inputs.

    Raises:
        InputError: The place holds another run's result and `overwrite` is not set.
    """
    if not path.exists() or overwrite:
        return False
    if found is not None and found.digest == wanted.digest:
        return True
    changed = [] if found is None else differences(found.inputs, wanted.inputs)
    reason = f" (different: {', '.join(changed)})" if changed else ""
    raise InputError(
        f"{path} holds the result of another run{reason}; name another model.output_dir, "
        "or set model.overwrite to true to replace it"
    )


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of inputs that are not the same."""
    return sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary sibling of `path` to write, as file or folder; renames it when complete.

    Whatever goes wrong, `path` is afterwards what it was before, and the sibling is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(path, "partial")
    _remove(partial)
    _recover(path)
    try:
        yield partial
        put_in_place(partial, path)
    except BaseException:
        _remove(partial)
        raise


def put_in_place(made: Path, path: Path) -> None:
    """Renames a complete file or folder on the same disk; what was at its new place is gone.

    Whatever goes wrong, both are afterwards what they were before; if the process is killed in
    between, `replacing` brings the old one back.
    """
    _recover(path)
    old = _sibling(path, "old")
    try:
        # A folder cannot be renamed over another, and deleting the old one first would lose it.
        if path.is_dir():
            path.replace(old)
        made.replace(path)
    except BaseException:
        _recover(path)
        raise
    _remove(old)


def _recover(path: Path) -> None:
    """Brings back what was set aside, if nothing took its place."""
    old = _sibling(path, "old")
    if old.exists() and not path.exists():
        old.replace(path)
    _remove(old)


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as readable JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuses to start writing what will not fit.

    Raises:
        OSError: The disk has fewer free bytes (ENOSPC, as the write itself would raise).
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        message = (
            f"{folder} needs {num_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free"
        )
        raise OSError(errno.ENOSPC, message)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for one run; the lock goes with the process, however it ends.

    Raises:
        InputError: Another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another run is writing to {folder}; wait for it, or name another model.output_dir"
            ) from None
        yield
