"""sweep.json: one entry a run, written anew after each; the page and the picture made from it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_smoe.errors import InputError
from lightning_smoe.evaluation.report import Judged, beaten_by_plain
from lightning_smoe.evaluation.spread import Row, draw, rows_of, to_markdown
from lightning_smoe.models.artifact import Manifest, is_current, replacing, write_json

SCHEMA = 1
NAME = "sweep.json"

Key = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class SweepFile:
    """What was tried so far; see lightning_smoe/evaluation/README.md for the keys.

    Args:
        path: Where it is.
        content: What stands in it.
    """

    path: Path
    content: dict[str, Any]

    @staticmethod
    def open(path: Path, wanted: Manifest, overwrite: bool) -> "SweepFile":
        """Opens a file for more runs, or begins one; nothing is written yet.

        Args:
            path: Where it is, or is to be.
            wanted: The original, and the text it is compared on.
            overwrite: Begin anew where the file is of others.

        Raises:
            InputError: It is of others, and may not be replaced.
        """
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        before = Manifest.from_json(found.get("manifest"))
        if before is not None and before.digest == wanted.digest:
            return SweepFile(path, found)
        is_current(path, before, wanted, overwrite)
        start: dict[str, Any] = {
            "schema": SCHEMA,
            "teacher": None,
            "runs": [],
            "manifest": wanted.to_json(),
        }
        return SweepFile(path, start)

    @property
    def teacher(self) -> dict[str, Any] | None:
        """The original's entry; none before the first run."""
        found: dict[str, Any] | None = self.content["teacher"]
        return found

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Entries of all runs."""
        found: list[dict[str, Any]] = self.content["runs"]
        return found

    def has(self, key: Key, wanted: Manifest, overwrite: bool) -> bool:
        """Whether the result of a run is there; that of one which failed is not.

        Args:
            key: Recipe, keep and seed.
            wanted: What the result is to be made from.
            overwrite: Run again what is there.

        Raises:
            InputError: It is there, was made from other inputs, and may not be replaced.
        """
        entry = self._find(key)
        if entry is None or "error" in entry:
            return False
        try:
            return is_current(self.path, Manifest.from_json(entry["manifest"]), wanted, overwrite)
        except InputError as error:
            raise InputError(f"{describe(key)}: {error}") from error

    def add(self, key: Key, result: Judged | str, manifest: Manifest | None) -> None:
        """Writes one run more, in the place of an earlier one.

        Args:
            key: Recipe, keep and seed.
            result: What it gave, or why it gave nothing.
            manifest: What it was made from; none where that cannot be said.
        """
        entry: dict[str, Any] = {"error": result}
        if isinstance(result, Judged):
            entry = {k: v for k, v in result.to_json().items() if k not in ("path", "tasks")}
        entry = {**key, **entry}
        if manifest is not None:
            entry["manifest"] = manifest.to_json()
        old = self._find(key)
        self.content["runs"] = [*(e for e in self.runs if e is not old), entry]
        write_json(self.path, self.content)

    def _find(self, key: Key) -> dict[str, Any] | None:
        # As text: a keep of 1 is one expert, and 1.0 is all of them.
        return next(
            (e for e in self.runs if all(str(e[k]) == str(v) for k, v in key.items())), None
        )


def describe(key: Key) -> str:
    """A run in words."""
    return f"{key['recipe']}, keep {key['keep']}, seed {key['seed']}"


def warnings_of(rows: list[Row]) -> list[str]:
    """A sentence for each recipe that does not beat plain pruning at the same size."""
    lines = []
    for keep in dict.fromkeys(row.keep for row in rows):
        models = {
            row.name: {"experts_per_layer": row.experts_per_layer, "kl": {"mean": row.mean_kl}}
            for row in rows
            if row.keep == keep
        }
        lines += [f"keep {keep}: {line}" for line in beaten_by_plain(models)]
    return lines


def write_page(file: SweepFile) -> None:
    """Writes sweep.md and sweep.png beside a sweep.json."""
    rows = rows_of(file.runs)
    draw(rows, file.path.with_suffix(".png"))
    with replacing(file.path.with_suffix(".md")) as partial:
        partial.write_text("\n".join(_page(file, rows)) + "\n", encoding="utf-8")


def _page(file: SweepFile, rows: list[Row]) -> list[str]:
    text = file.content["manifest"]["inputs"]["split"]
    teacher = file.teacher or {}
    lines = [
        "# Sweep",
        "",
        f"KL(original || model) in nats a token and perplexity on the {text} text: means over its "
        "domains, then over seeds, ± one standard deviation over seeds. Seconds are those of plan "
        "and compress. No training. `prune-...` is plain pruning.",
        "",
        f"The original: perplexity {teacher['perplexity']['mean']:.2f}, "
        f"{teacher['num_bytes'] / 1e6:.2f} MB, {max(teacher['experts_per_layer'])} experts.",
        "",
        *to_markdown(rows),
        "",
        "![quality against size](sweep.png)",
    ]
    failed = [f"{describe(e)}: {e['error']}" for e in file.runs if "error" in e]
    for title, found in (("No better than plain pruning", warnings_of(rows)), ("Failed", failed)):
        if found:
            lines += ["", f"## {title}", "", *(f"* {line}" for line in found)]
    return lines
