"""A folder of a teacher's answers, which knows what they were made from."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_smoe.errors import InputError
from lightning_smoe.models.artifact import Manifest, is_current, require_space, write_json
from lightning_smoe.training.teacher_shards import AnswerFormat, Shard

# The type of the weights while they answered: it decides last bits, not whose answers they are.
NUMBERS = "numbers"
# Held-out text is judged at this temperature, whatever the objective's is.
VALID_TEMPERATURE = 1.0
_MANIFEST = "manifest.json"


@dataclass(frozen=True, eq=False)
class CacheFolder:
    """Answers on the training and the held-out text, in shards.

    Args:
        path: The folder.
        manifest: What they are made from.
        format: What is kept of each.
        temperature: That of the training text.
        num_windows: Windows of each split.
        num_tokens: Answers of each split.
        windows_per_shard: Windows of each file but the last of a split.
    """

    path: Path
    manifest: Manifest
    format: AnswerFormat
    temperature: float
    num_windows: Mapping[str, int]
    num_tokens: Mapping[str, int]
    windows_per_shard: int

    @staticmethod
    def read(path: Path) -> "CacheFolder":
        """Reads what a folder holds, but for the answers.

        Raises:
            InputError: There is no cache, or its description is damaged.
        """
        try:
            stored = json.loads((path / _MANIFEST).read_text("utf-8"))
            manifest = Manifest.from_json(stored.pop("manifest"))
            del stored["bytes_per_token"]
            stored["format"] = AnswerFormat(**stored["format"])
            found = CacheFolder(path, manifest, **stored)  # type: ignore[arg-type]  # not none
        except FileNotFoundError:
            raise InputError(
                f"{path} holds no answers of the teacher; run `python -m lightning_smoe cache`"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path / _MANIFEST} is damaged ({error}); delete {path} and run "
                "`python -m lightning_smoe cache` again"
            ) from error
        return found

    def temperature_of(self, split: str) -> float:
        """What divides the logits of a split."""
        return VALID_TEMPERATURE if split == "valid" else self.temperature

    def shards(self, split: str) -> list[Shard]:
        """The files of a split, first windows first."""
        number, step = self.num_windows[split], self.windows_per_shard
        return [Shard(split, i, min(step, number - i)) for i in range(0, number, step)]

    def missing(self) -> list[Shard]:
        """Files that are not there, or cut short, or of another cache."""
        wanted = [shard for split in self.num_windows for shard in self.shards(split)]
        return [s for s in wanted if not s.is_finished(self.path, self.manifest.digest)]

    def is_complete(self, overwrite: bool = False) -> bool:
        """Says whether nothing is to be done.

        Args:
            overwrite: Replace what is there; what was cut off is continued all the same.

        Raises:
            InputError: The folder holds other answers, and `overwrite` is not set.
        """
        path = self.path / _MANIFEST
        found = CacheFolder.read(self.path).manifest if path.exists() and not overwrite else None
        return is_current(path, found, self.manifest, overwrite) and not self.missing()

    def prepare(self, overwrite: bool = False) -> None:
        """Makes the folder ready for answers; takes away what is to be replaced.

        Raises:
            InputError: The folder holds other answers, and `overwrite` is not set.
            OSError: What is to come does not fit on the disk.
        """
        if self.is_complete(overwrite):
            return
        path = self.path / _MANIFEST
        stored = json.loads(path.read_text("utf-8"))["manifest"] if path.exists() else {}
        is_continued = stored.get("digest") == self.manifest.digest
        if self.path.exists() and (not is_continued or not self.missing()):
            shutil.rmtree(self.path)
        require_space(self.path, self.bytes_to_come())
        if not path.exists():
            described = {
                "manifest": self.manifest.to_json(),
                "format": asdict(self.format),
                "bytes_per_token": self.format.bytes_per_token,
                "temperature": self.temperature,
                "num_windows": dict(self.num_windows),
                "num_tokens": dict(self.num_tokens),
                "windows_per_shard": self.windows_per_shard,
            }
            write_json(path, described)

    def bytes_to_come(self) -> int:
        """Size of the files that are missing, within a percent."""
        share = {split: n / self.num_windows[split] for split, n in self.num_tokens.items()}
        tokens = sum(share[shard.split] * shard.num_windows for shard in self.missing())
        return int(tokens * (self.format.bytes_per_token + 1))

    def describe(self) -> str:
        """Says in one line how much is kept."""
        each, count = self.format.bytes_per_token, sum(self.num_tokens.values())
        kept = "every token" if self.format.is_whole else f"the {self.format.top_k} likeliest"
        return (
            f"{count:,} distributions of {each} bytes ({kept}, {self.format.precision}), "
            f"{count * each / 1e6:.1f} MB"
        )

    def check_made_from(self, wanted: Manifest) -> None:
        """Compares with what an experiment would make.

        Raises:
            InputError: Something that decides the answers differs; all of it is named.
        """
        there, here = self.manifest.inputs, wanted.inputs
        differ = [k for k in here if k != NUMBERS and there.get(k) != here[k]]
        if differ:
            named = ", ".join(_named(key, there.get(key), here[key]) for key in differ)
            raise InputError(
                f"the teacher's answers in {self.path} do not fit this experiment (different: "
                f"{named}); set what differs as it was, or make them again with `python -m "
                "lightning_smoe cache` and model.overwrite=true"
            )


def _named(key: str, there: Any, here: Any) -> str:
    hashes = key == "teacher" or key.endswith(("tokenizer", "text"))
    return key if hashes else f"{key}: {there} there, {here} here"
