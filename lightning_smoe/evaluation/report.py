"""The report: what compression cost and what it kept, beside plain baselines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_smoe.evaluation.perplexity import Quality
from lightning_smoe.models.artifact import Manifest, write_json

_SCHEMA = 1
TEACHER = "original"


@dataclass(frozen=True)
class Judged:
    """One model's part of the report.

    Args:
        path: Folder of the checkpoint; none for a baseline that was judged in memory.
        num_parameters: Parameters.
        num_bytes: Size of the weights as stored, in bytes.
        experts_per_layer: Routed experts of each mixture-of-experts layer.
        quality: What it keeps.
        seconds: Wall time of the steps that made it, by verb.
    """

    path: Path | None
    num_parameters: int
    num_bytes: int
    experts_per_layer: list[int]
    quality: Quality
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Returns the model as it stands in report.json."""
        return {
            "path": None if self.path is None else str(self.path),
            "num_parameters": self.num_parameters,
            "num_bytes": self.num_bytes,
            "experts_per_layer": self.experts_per_layer,
            **self.quality.to_json(),
            "tasks": {},
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }


def write_report(
    folder: Path, teacher: dict[str, Any], models: dict[str, dict[str, Any]], manifest: Manifest
) -> None:
    """Writes report.md, then report.json.

    Args:
        folder: Where to write.
        teacher: Entry of the original.
        models: Entries of the others, by name.
        manifest: What the report is made from.
    """
    stored = {"schema": _SCHEMA, "teacher": teacher, "models": models}
    (folder / "report.md").write_text(to_markdown(teacher, models))
    write_json(folder / "report.json", {**stored, "manifest": manifest.to_json()})


def _rows(teacher: dict[str, Any], models: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Name, experts, parameters, size, perplexity, KL, KL relative to REAP, agreement."""
    reap = models.get("prune-reap", {}).get("kl", {}).get("mean")
    rows = []
    for name, model in {TEACHER: teacher, **models}.items():
        counts = sorted(set(model["experts_per_layer"]))
        kl = model["kl"]["mean"]
        rows.append(
            [
                name,
                str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}",
                _millions(model["num_parameters"]),
                _decimals(model["perplexity"]["mean"], 2),
                _decimals(kl, 4),
                "" if not reap or name == TEACHER else f"{kl / reap:.2f}",
                f"{model['top1_agreement']:.1%}",
            ]
        )
    return rows


_COLUMNS = ("model", "experts", "params", "perplexity", "KL", "of REAP's", "top-1")
# Characters of a number in the table; larger ones are written with an exponent.
_WIDEST = 10


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count < 100_000_000 else f"{count / 1e9:.2f} B"


def _decimals(value: float, places: int) -> str:
    plain = f"{value:.{places}f}"
    return plain if len(plain) <= _WIDEST else f"{value:.2e}"


def to_table(teacher: dict[str, Any], models: dict[str, dict[str, Any]]) -> Table:
    """The report as a table for the screen, at most 79 columns wide; long names are folded."""
    table = Table(title="what it cost and what it kept, on held-out text")
    table.add_column(_COLUMNS[0], overflow="fold")
    for column in _COLUMNS[1:]:
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in _rows(teacher, models):
        table.add_row(*row)
    return table


def to_markdown(teacher: dict[str, Any], models: dict[str, dict[str, Any]]) -> str:
    """The report as a page: the table, then KL by domain."""
    domains = list(teacher["kl"]["domains"])
    lines = [
        "# Report",
        "",
        "Perplexity and KL(original || model) in nats a token on held-out text: means over the "
        "domains. Baselines are plain pruning at the same number of experts, without refit or "
        "training.",
        "",
        *_markdown_table(_COLUMNS, _rows(teacher, models)),
        "",
        "## KL by domain",
        "",
        *_markdown_table(
            ("model", *domains),
            [[n, *(f"{m['kl']['domains'][d]:.4f}" for d in domains)] for n, m in models.items()],
        ),
        "",
        "## Perplexity by domain",
        "",
        *_markdown_table(
            ("model", *domains),
            [
                [n, *(f"{m['perplexity']['domains'][d]:.2f}" for d in domains)]
                for n, m in {TEACHER: teacher, **models}.items()
            ],
        ),
        "",
        "## Seconds by step",
        "",
        *[
            f"* {n}: " + ", ".join(f"{s} {t}" for s, t in m["seconds"].items())
            for n, m in models.items()
            if m["seconds"]
        ],
    ]
    return "\n".join(lines) + "\n"


def _markdown_table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    head = "| " + " | ".join(columns) + " |"
    rule = "| --- |" + " ---: |" * (len(columns) - 1)
    return [head, rule, *("| " + " | ".join(row) + " |" for row in rows)]
