"""A small teacher, its text, and the cache of its answers."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import default_collate
from transformers import PreTrainedModel

from lightning_smoe.data.positions import counted_positions
from lightning_smoe.data.samplers import WindowDataset
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.functional.divergence import log_probabilities
from lightning_smoe.functional.targets import TeacherTokens
from lightning_smoe.training.cache_module import write_cache
from lightning_smoe.training.cache_plan import TeacherCache, planned_cache
from lightning_smoe.training.teacher import LiveTeacher, Teacher
from lightning_smoe.training.teacher_cache import CacheFolder
from tests.families import build
from tests.training.students import CHECKPOINT, CORPUS, VOCAB_SIZE

EVERYTHING = slice(None)


def teacher_model() -> PreTrainedModel:
    """The model that answers."""
    return build("qwen2_moe", 0, VOCAB_SIZE)


@cache
def text(**options: Any) -> TextDataModule:
    """Short text of two domains: 8 windows to train on, 4 held out; read once, not to be changed.

    Options must be hashable.
    """
    small: dict[str, Any] = {
        "tokenizer": CHECKPOINT,
        "train": str(CORPUS / "calib"),
        "sequence_length": 16,
        "train_tokens": 8 * 16,
        "valid_tokens": 4 * 16,
        "domains": ["arith", "lit"],
        "batch_size": 2,
    }
    return TextDataModule(**(small | options))


def plan(folder: Path, data: TextDataModule, **options: Any) -> CacheFolder:
    """A cache with files of four windows, or as many as are asked for."""
    windows = options.pop("windows", 4)
    fixed = {"teacher": "teacher", "vocab_size": VOCAB_SIZE, "numbers": "float32"}
    settings: dict[str, Any] = {**fixed, **options.pop("planned", {})}
    kept = TeacherCache(**options)
    planned = planned_cache(folder, data, kept, **settings)
    return CacheFolder(**{**vars(planned), "windows_per_shard": windows})


def trainer(**options: Any) -> Trainer:
    """A trainer that only asks."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, **quiet, **options}
    return Trainer(**settings, use_distributed_sampler=False)


def fill(folder: CacheFolder, data: TextDataModule, **options: Any) -> None:
    """Lets the teacher answer."""
    overwrite = options.pop("overwrite", False)
    teacher = LiveTeacher(teacher_model())
    write_cache(trainer(**options), teacher, data, folder, overwrite=overwrite)


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def batch_of(data: TextDataModule, split: str, *windows: int) -> dict[str, Tensor]:
    """Some windows as a batch."""
    dataset = WindowDataset(data.windows(split))
    batch: dict[str, Tensor] = default_collate([dataset[i] for i in windows])
    return batch


def tokens_of(
    teacher: Teacher, batch: dict[str, Tensor], split: str, rows: slice = EVERYTHING
) -> TeacherTokens:
    """What a teacher says at the counted positions of a batch."""
    return teacher.answer(batch, counted_positions(batch), split, False).tokens(rows)


def student_logits(num_tokens: int) -> Tensor:
    """Some other model's logits."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(num_tokens, VOCAB_SIZE, generator=generator)


def classes_of_student(tokens: TeacherTokens, temperature: float = 1.0) -> Tensor:
    """The other model's log-probabilities of the teacher's classes."""
    known = tokens.log_probs(temperature)
    return tokens.classes_of(log_probabilities(student_logits(len(known)), temperature))
