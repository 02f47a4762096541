"""The report: what compression cost and what it kept, beside plain baselines."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_smoe.evaluation.perplexity import Quality
from lightning_smoe.models.artifact import Manifest, write_json

_SCHEMA = 1
TEACHER = "original"
_PLAIN = "prune-"


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
        tasks: Metrics of each task and, behind `_stderr`, their standard errors.
    """

    path: Path | None
    num_parameters: int
    num_bytes: int
    experts_per_layer: list[int]
    quality: Quality
    seconds: dict[str, float]
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the model as it stands in report.json."""
        return {
            "path": None if self.path is None else str(self.path),
            "num_parameters": self.num_parameters,
            "num_bytes": self.num_bytes,
            "experts_per_layer": self.experts_per_layer,
            **self.quality.to_json(),
            "tasks": self.tasks,
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


def beaten_by_plain(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each model that plain pruning at the same number of experts does not lose to.

    Args:
        models: Entries of the report by name; those named prune-... are plain pruning.
    """
    plain = {name: model for name, model in models.items() if name.startswith(_PLAIN)}
    lines = []
    for name, model in models.items():
        total, kl = sum(model["experts_per_layer"]), model["kl"]["mean"]
        rivals = {
            n: m["kl"]["mean"] for n, m in plain.items() if sum(m["experts_per_layer"]) == total
        }
        best = min(rivals, key=rivals.__getitem__, default=None)
        if best is not None and name not in plain and not kl < rivals[best]:
            lines.append(
                f"{name} (KL {kl:.4f}) is no better than plain pruning at the same number of "
                f"experts: {best} (KL {rivals[best]:.4f})"
            )
    return lines


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
        *_task_page(teacher, models),
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


def to_task_table(teacher: dict[str, Any], models: dict[str, dict[str, Any]]) -> Table:
    """What the models score on tasks, as a table for the screen; long names are folded."""
    head, *rows = _task_rows(teacher, models)
    table = Table(title="what they score on tasks, in percent, with standard errors")
    for column in head:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _task_rows(teacher: dict[str, Any], models: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Names of the models, then task and metric with what each model scores."""
    entries = {TEACHER: teacher, **models}
    rows = [["task", *entries]]
    for task, metrics in teacher["tasks"].items():
        for metric in (key for key in metrics if not _is_error(key)):
            scores = [_score(entry["tasks"].get(task, {}), metric) for entry in entries.values()]
            rows.append([f"{task} {metric}", *scores])
    return rows


def _is_error(key: str) -> bool:
    return key.partition(",")[0].endswith("_stderr")


def _score(metrics: dict[str, float], metric: str) -> str:
    if metric not in metrics:
        return ""
    name, comma, filtered = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{filtered}")
    value = f"{100 * metrics[metric]:.1f}"
    return value if error is None else f"{value} ± {100 * error:.1f}"


def _task_page(teacher: dict[str, Any], models: dict[str, dict[str, Any]]) -> list[str]:
    if not teacher["tasks"]:
        return []
    head, *rows = _task_rows(teacher, models)
    return [
        "## Tasks",
        "",
        "In percent, with standard errors, from lm-evaluation-harness without a chat template.",
        "",
        *_markdown_table(tuple(head), rows),
        "",
    ]


def _markdown_table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    head = "| " + " | ".join(columns) + " |"
    rule = "| --- |" + " ---: |" * (len(columns) - 1)
    return [head, rule, *("| " + " | ".join(row) + " |" for row in rows)]
