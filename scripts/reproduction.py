"""Prints what was published about a compressed model beside what this project's reports say.

Reads configs/published/*.json, and the report.json of the experiments in configs/ that compress the
same model on the paper's calibration text; what has no report, or none on tasks, is `not run`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
# The paper's calibration text: with another the rows would not be comparable.
TEXT = "data/wikitext2.yaml"
TASKS = ("arc_challenge", "arc_easy", "mmlu", "winogrande")


def tables(root: Path) -> str:
    """Returns one Markdown table for each model of which something was published."""
    parts = []
    for path in sorted((root / "configs" / "published").glob("*.json")):
        published = json.loads(path.read_text(encoding="utf-8"))
        head = ["who", "method", "experts", *TASKS]
        rows = [*_published(published), *_ours(root, published["model"])]
        rows.sort(key=lambda row: -int(row[2]))
        lines = ["| " + " | ".join(row) + " |" for row in (head, _rule(head), *rows)]
        parts.append("\n".join([f"### {published['model']}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _rule(head: list[str]) -> list[str]:
    return [*["---"] * 2, *["---:"] * (len(head) - 2)]


def _published(published: dict[str, Any]) -> Iterator[list[str]]:
    for row in published["rows"]:
        yield [row["source"], row["method"], str(row["experts"]), *_scores(row["tasks"])]


def _ours(root: Path, model: str) -> Iterator[list[str]]:
    """One row for each experiment, and one for the original that they all begin with."""
    original = None
    for config in sorted((root / "configs").glob("*.yaml")):
        whole = yaml.safe_load(config.read_text(encoding="utf-8"))
        experiment = whole["model"]
        if experiment["checkpoint"] == model and whole.get("data") == TEXT:
            report = root / experiment["output_dir"] / "report.json"
            found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else None
            original = original or found
            method = Path(experiment["recipe"]).stem
            compressed = found and found["models"].get("compressed")
            yield ["ours", f"`{method}`", str(experiment["keep"]), *_scores_of(compressed)]
    yield ["ours", "original", "60", *_scores_of(original and original["teacher"])]


def _scores_of(entry: dict[str, Any] | None) -> list[str]:
    return _scores(entry["tasks"] if entry else {})


def _scores(tasks: dict[str, dict[str, float]]) -> list[str]:
    return [f"{tasks[name]['acc']:.3f}" if name in tasks else "not run" for name in TASKS]


if __name__ == "__main__":
    print(tables(ROOT), end="")
