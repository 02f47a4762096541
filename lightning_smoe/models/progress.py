"""How far a walk over decoder layers came, on disk: a killed one goes on at the layer it was at."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_smoe.models.artifact import replacing, sha256_of_tensors, write_json

_ORIGIN, _HASH = "walk.json", "sha256"

Reduce = Callable[[Tensor, str], Tensor]


class WalkProgress:
    """A folder beside an artifact that is in the making; every process notes its own states there.

    Args:
        artifact: What is made.
        digest: Of what it is made from; what was noted for another is dropped.
        rank: Number of this process.
        num_processes: All processes; what another number of them noted is dropped.
        text: What decides which text stands in which batch; what was noted of others is dropped.
        reduce: Sum or maximum of a tensor over processes, as its second argument says; none for
            one process.
    """

    def __init__(
        self,
        artifact: Path,
        digest: str,
        *,
        rank: int = 0,
        num_processes: int = 1,
        text: Any = None,
        reduce: Reduce | None = None,
    ) -> None:
        self.folder = parts_of(artifact)
        self._origin = {"digest": digest, "processes": num_processes, "text": text}
        self._rank = rank
        self._reduce: Reduce = reduce or (lambda tensor, _how: tensor)

    def open(self) -> int:
        """Drops what was noted for something else.

        Returns:
            Decoder layers that all processes are through with.
        """
        done = 0
        if self._is_ours():
            noted = [int(path.name.split("-")[1]) for path in self.folder.glob(self._name("*"))]
            done = max(filter(self._is_whole, noted), default=0)
        # Processes may be a layer apart, and each keeps its last two.
        agreed = -int(self._reduce(torch.tensor(-done), "max"))
        if agreed == 0 and self._rank == 0:
            self.close()
            self.folder.mkdir(parents=True)
            write_json(self.folder / _ORIGIN, self._origin)
        # A barrier: nobody writes before the folder is there.
        self._reduce(torch.tensor(0), "max")
        return agreed

    def _is_ours(self) -> bool:
        path = self.folder / _ORIGIN
        return path.exists() and json.loads(path.read_text()) == self._origin

    def _name(self, layer: int | str) -> str:
        number = layer if isinstance(layer, str) else f"{layer:05d}"
        return f"states-{number}-{self._rank}.safetensors"

    def note(self, done: int, states: Mapping[str, Tensor]) -> None:
        """Notes that this process is through with so many layers, and the states behind them."""
        # A barrier: one that ran ahead would drop what the last one goes on from after a kill.
        self._reduce(torch.tensor(0), "max")
        kept = {name: t.cpu().contiguous() for name, t in states.items()}
        with replacing(self.folder / self._name(done)) as partial:
            save_file(kept, partial, metadata={_HASH: sha256_of_tensors(kept)})
        (self.folder / self._name(done - 2)).unlink(missing_ok=True)

    def states(self, done: int) -> dict[str, Tensor]:
        """What was noted."""
        return load_file(self.folder / self._name(done))

    def _is_whole(self, done: int) -> bool:
        """Whether states that were noted are those that were written."""
        path = self.folder / self._name(done)
        try:
            with safe_open(path, "pt") as file:
                noted = file.metadata() or {}
            return noted.get(_HASH) == sha256_of_tensors(self.states(done))
        except SafetensorError:
            return False

    def path(self, name: str) -> Path:
        """A place for what else is kept until the artifact is complete."""
        return self.folder / name

    def close(self) -> None:
        """Takes the folder away, once the artifact is complete."""
        if self._rank == 0:
            drop_parts_in(self.folder)


def drop_parts_in(folder: Path) -> None:
    """Takes a folder of parts away; what is left by a kill in between is nobody's."""
    (folder / _ORIGIN).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def drop_parts(artifact: Path) -> None:
    """Takes away what a run left that was killed just behind the completion of its artifact."""
    drop_parts_in(parts_of(artifact))


def parts_of(artifact: Path) -> Path:
    """The folder beside an artifact that holds the parts of it that are done."""
    return artifact.with_name(f".{artifact.name}.parts")
