"""Files of a teacher's answers: some windows each, whole or absent, read a few rows at a time."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_smoe.errors import InputError
from lightning_smoe.models.artifact import replacing

Precision = Literal["float32", "float16"]

_HEADER = "answers"
_AGAIN = (
    "delete it and run `python -m lightning_smoe cache` again, which makes only what is missing"
)


@dataclass(frozen=True)
class AnswerFormat:
    """What is kept of a next-token distribution.

    Args:
        vocab_size: Tokens that there are.
        top_k: Likeliest tokens that are named; with all of them no indices are kept.
        precision: Type of the log-probabilities.
    """

    vocab_size: int
    top_k: int
    precision: Precision

    @property
    def is_whole(self) -> bool:
        """Whether every token has its log-probability, in the order of the vocabulary."""
        return self.top_k >= self.vocab_size

    @property
    def num_columns(self) -> int:
        """Log-probabilities a distribution: the last is that of all tokens that are not named."""
        return self.vocab_size if self.is_whole else self.top_k + 1

    @property
    def dtype(self) -> torch.dtype:
        """Type of the log-probabilities in a file."""
        return {"float32": torch.float32, "float16": torch.float16}[self.precision]

    @property
    def bytes_per_token(self) -> int:
        """Size of one distribution in a file."""
        indices = 0 if self.is_whole else self.top_k * torch.int32.itemsize
        return indices + self.num_columns * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Answers:
    """Distributions at some positions, as they lie in a file.

    Args:
        log_probs: Log-probabilities of the named tokens, then of all others together; of all
            tokens, where `indices` is none.
        indices: The named tokens.
    """

    log_probs: Float[Tensor, "tokens classes"]
    indices: Int[Tensor, "tokens top_k"] | None


@dataclass(frozen=True)
class Shard:
    """Consecutive windows of a split whose answers share a file.

    Args:
        split: Name of the split.
        first: Index of the first window.
        num_windows: How many there are.
    """

    split: str
    first: int
    num_windows: int

    @property
    def name(self) -> str:
        """Name of the file."""
        return f"{self.split}-{self.first:08d}.safetensors"

    def is_finished(self, folder: Path, digest: str) -> bool:
        """Says whether the file is there, as long as it should be, and of this cache."""
        try:
            return ShardFile.header(folder / self.name).get("digest") == digest
        except (FileNotFoundError, InputError):
            return False

    def write(
        self, folder: Path, answers: Answers, counted: Bool[Tensor, "windows sequence"], digest: str
    ) -> None:
        """Writes the file.

        Args:
            folder: Where to.
            answers: One for each counted position, window by window.
            counted: Which positions have an answer.
            digest: What the cache is made from.
        """
        tensors = {"log_probs": answers.log_probs, "counted": counted}
        if answers.indices is not None:
            tensors["indices"] = answers.indices
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        header = {"digest": digest, "sha256": _hash(tensors)}
        with replacing(folder / self.name) as partial:
            # One entry: safetensors writes several in an order that differs from run to run.
            save_file(tensors, partial, metadata={_HEADER: json.dumps(header)})


class ShardFile:
    """One file, open for reading; what is read is what is asked for.

    Args:
        folder: Folder of the cache.
        shard: Which file.

    Raises:
        InputError: The file is not there, or is damaged.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.shard = shard
        self.path = folder / shard.name
        self._sha256 = self.header(self.path).get("sha256")
        # Any: the methods of what safetensors opens are untyped.
        opened: Any = safe_open(self.path, "pt")
        self._file = opened
        self.counted: Tensor = self._file.get_tensor("counted")
        counts = self.counted.sum(1)
        self.starts = (counts.cumsum(0) - counts).tolist()

    @staticmethod
    def header(path: Path) -> dict[str, Any]:
        """What a file says of itself.

        Raises:
            FileNotFoundError: It is not there.
            InputError: It is damaged, or no file of ours.
        """
        try:
            with safe_open(path, "pt") as file:
                found: dict[str, Any] = json.loads((file.metadata() or {})[_HEADER])
        except (SafetensorError, KeyError) as error:
            raise InputError(f"{path} is damaged ({error}); {_AGAIN}") from error
        return found

    def verify(self) -> None:
        """Reads every byte once.

        Raises:
            InputError: They are not those that were written.
        """
        # keys(): what safetensors opens is not a dict.
        if _hash({n: self._file.get_tensor(n) for n in self._file.keys()}) != self._sha256:  # noqa: SIM118
            raise InputError(f"{self.path} is damaged (its content has changed); {_AGAIN}")

    def rows_of(self, window: int, counted: Bool[Tensor, " sequence"]) -> Int[Tensor, " tokens"]:
        """Rows of a window's positions in the file.

        Args:
            window: Index of the window in its split.
            counted: Which positions are asked for.

        Raises:
            ValueError: One of them has no answer.
        """
        row = window - self.shard.first
        stored = self.counted[row]
        if bool((counted & ~stored).any()):
            raise ValueError(f"{self.path} has no answer at some positions of window {window}")
        rows: Tensor = self.starts[row] + (stored.cumsum(0) - 1)[counted]
        return rows

    def read(self, rows: Int[Tensor, " tokens"]) -> Answers:
        """Answers in some rows, which should lie close together."""
        first, last = int(rows.min()), int(rows.max()) + 1

        def part(name: str) -> Tensor:
            found: Tensor = self._file.get_slice(name)[first:last]
            return found[rows - first]

        has_indices = "indices" in self._file.keys()  # noqa: SIM118 - not a dict
        return Answers(part("log_probs"), part("indices") if has_indices else None)


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()
