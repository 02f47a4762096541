"""The compare verb: finished runs side by side, from their reports alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_smoe.errors import InputError
from lightning_smoe.evaluation.spread import Row, draw, rows_of, to_markdown, to_table
from lightning_smoe.models.artifact import replacing

_FILES = ("report.json", "sweep.json")
_SCHEMA = 1
# Of a hash, in a message.
_SHORT = 12


@dataclass(frozen=True)
class _Found:
    """What one file of a run says."""

    path: Path
    original: str
    text: str
    entries: list[dict[str, Any]]


def compare(runs: Sequence[Path], output: Path | None = None) -> None:
    """Shows runs in one table.

    Args:
        runs: Folders with report.json or sweep.json.
        output: Folder for compare.md and compare.png; none only shows the table.

    Raises:
        InputError: A folder has no result, or they are of different originals.
    """
    if output is not None and output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; name a folder")
    found = [file for run, name in _named(runs).items() for file in _read(run, name)]
    if not found:
        raise InputError("compare RUN [RUN ...]: name at least one folder")
    _check_original(found)
    rows = rows_of(entry for file in found for entry in file.entries)
    note = _note(found)
    console = Console()
    console.print(to_table(rows, "what is kept of the original"))
    if note:
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    if output is not None:
        _write(output, rows, note)
        console.print(f"Comparison: {output / 'compare.md'}", soft_wrap=True)


def _named(runs: Sequence[Path]) -> dict[Path, str]:
    """Names folders by their last part, or as they were typed where two would have one name."""
    folders = {run.resolve(): run for run in runs}
    last = [run.name for run in folders]
    return {run: str(run) if last.count(f.name) > 1 else f.name for f, run in folders.items()}


def _read(run: Path, name: str) -> list[_Found]:
    paths = [run / name for name in _FILES if (run / name).is_file()]
    if not paths:
        raise InputError(f"{run} has no {' and no '.join(_FILES)}; name the output_dir of a run")
    return [_read_file(path, name) for path in paths]


def _read_file(path: Path, run: str) -> _Found:
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        inputs = stored["manifest"]["inputs"]
        if stored["schema"] != _SCHEMA:
            raise ValueError(f"schema {stored['schema']}")
        if "models" in stored:
            entries = [{"recipe": n, "keep": "", **m} for n, m in stored["models"].items()]
            text = inputs["test text"]
        else:
            entries, text = list(stored["runs"]), inputs["held-out text"]
        named = [{**entry, "recipe": f"{run}/{entry['recipe']}"} for entry in entries]
        return _Found(path, inputs["checkpoint"], text, named)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not a result of this version ({type(error).__name__}: {error}); make it "
            "again"
        ) from error


def _check_original(found: Sequence[_Found]) -> None:
    originals = {file.original: file.path for file in found}
    if len(originals) > 1:
        named = ", ".join(f"{path} of {mark[:_SHORT]}" for mark, path in originals.items())
        raise InputError(
            f"the runs are of different originals, which cannot be compared ({named}); compare "
            "the runs of each on its own"
        )


def _note(found: Sequence[_Found]) -> str:
    texts: dict[str, list[str]] = {}
    for file in found:
        texts.setdefault(file.text, []).append(str(file.path))
    if len(texts) == 1:
        return ""
    groups = "; ".join(", ".join(paths) for paths in texts.values())
    return f"Compare within these groups only, each has held-out text of its own: {groups}."


def _write(folder: Path, rows: Sequence[Row], note: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw(rows, folder / "compare.png")
    lines = [
        "# Comparison",
        "",
        "KL(original || model) in nats a token and perplexity on held-out text: means over its "
        "domains, then over seeds, ± one standard deviation over seeds.",
        "",
        *([note, ""] if note else []),
        *to_markdown(rows),
        "",
        "![quality against size](compare.png)",
    ]
    with replacing(folder / "compare.md") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
