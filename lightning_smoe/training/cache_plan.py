"""What an experiment would keep of its teacher's answers, and what they would be made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_smoe.data.positions import counted_positions
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.errors import InputError
from lightning_smoe.models.artifact import Manifest, sha256_of, sha256_of_file
from lightning_smoe.training.teacher_cache import NUMBERS, CacheFolder
from lightning_smoe.training.teacher_shards import AnswerFormat, Precision

SPLITS = ("train", "valid")
SHARD_BYTES = 64 << 20
# What decides which tokens a text has; settings beside them may change without any effect.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
)


@dataclass(frozen=True)
class TeacherCache:
    """What is kept of the original's next-token distributions, so that it need not be asked.

    Args:
        top_k: Likeliest tokens that are named, 1 or more; all others share one probability. The
            size of the vocabulary or more keeps everything.
        precision: Type of the log-probabilities; float16 rounds them to three digits.
        temperature: Divides the logits of the training text, above 0; that of the objectives.
            Held-out text is kept at temperature 1, at which it is judged.
    """

    top_k: int = 64
    precision: Precision = "float32"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be 1 or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")


def planned_cache(
    path: Path,
    data: TextDataModule,
    options: TeacherCache,
    *,
    teacher: str,
    vocab_size: int,
    numbers: str,
    shard_bytes: int = SHARD_BYTES,
) -> CacheFolder:
    """The cache that an experiment would make; tokenises both texts.

    Args:
        path: Folder of the answers.
        data: The text.
        options: What is kept.
        teacher: Fingerprint of the checkpoint that is asked.
        vocab_size: Columns of its logits.
        numbers: Type in which it computes, and how it is quantised.
        shard_bytes: Size of a file, roughly.
    """
    kept = AnswerFormat(vocab_size, min(options.top_k, vocab_size), options.precision)
    inputs: dict[str, Any] = {
        "tokenizer": _tokenizer_fingerprint(data),
        **{f"{split} text": data.fingerprint(split) for split in SPLITS},
        "packing": {"sequence_length": data.sequence_length, "pack": data.pack},
        "temperature": options.temperature,
        "teacher": teacher,
        "top_k": kept.top_k,
        "precision": kept.precision,
        NUMBERS: numbers,
    }
    windows = {split: data.windows(split) for split in SPLITS}
    window_bytes = data.sequence_length * (kept.bytes_per_token + 1)
    return CacheFolder(
        path,
        Manifest("cache", inputs),
        kept,
        options.temperature,
        {split: len(found) for split, found in windows.items()},
        {split: _num_counted(found.tensors()) for split, found in windows.items()},
        max(1, shard_bytes // window_bytes),
    )


def _num_counted(tensors: dict[str, Tensor]) -> int:
    every = torch.ones_like(tensors["domain"], dtype=torch.bool)
    return int(counted_positions({**tensors, "valid": every}).sum())


def _tokenizer_fingerprint(data: TextDataModule) -> str:
    if data.tokenizer is None:
        raise InputError("data.tokenizer is not set -> name the folder of a tokenizer")
    folder = Path(data.tokenizer).expanduser()
    there = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    return sha256_of([[path.name, sha256_of_file(path)] for path in there])
