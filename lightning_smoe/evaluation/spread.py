"""Runs of the same method on several seeds as one row, and rows as a table and a picture."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_smoe.models.artifact import replacing

Entry = Mapping[str, Any]

_COLUMNS = ("recipe", "keep", "experts", "KL", "perplexity", "top-1", "seconds", "MB", "seeds")
_ON_SCREEN = ("recipe", "keep", "KL", "perplexity", "top-1", "seconds", "MB")
# One line of each colour and mark that can be told apart.
_MARKERS = "osD^v<>Pp*X"
_COLOURS = 10


@dataclass(frozen=True)
class Row:
    """One method at one size, over its seeds.

    Args:
        name: The method.
        keep: What was asked for; empty if not known.
        experts_per_layer: Experts that are left.
        num_bytes: Size of the weights, in bytes.
        kl: Mean KL to the original of each seed, in nats a token.
        perplexity: Mean perplexity of each seed.
        top1_agreement: Fraction of tokens where the likeliest next token is the original's.
        seconds: Wall time that making it took, of each seed; empty if not known.
    """

    name: str
    keep: str
    experts_per_layer: list[int]
    num_bytes: int
    kl: list[float]
    perplexity: list[float]
    top1_agreement: list[float]
    seconds: list[float]

    @property
    def mean_kl(self) -> float:
        """KL over seeds."""
        return statistics.fmean(self.kl)

    def to_cells(self) -> dict[str, str]:
        """The row as it stands in a table, by column."""
        counts = sorted(set(self.experts_per_layer))
        experts = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
        return {
            "recipe": self.name,
            "keep": self.keep or experts,
            "experts": experts,
            "KL": _with_spread(self.kl, 4),
            "perplexity": _with_spread(self.perplexity, 2),
            "top-1": f"{statistics.fmean(self.top1_agreement):.1%}",
            "seconds": f"{statistics.fmean(self.seconds):.1f}" if self.seconds else "",
            "MB": f"{self.num_bytes / 1e6:.2f}",
            "seeds": str(len(self.kl)),
        }


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample; zero for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _with_spread(values: Sequence[float], places: int) -> str:
    mean = f"{statistics.fmean(values):.{places}f}"
    return mean if len(values) == 1 else f"{mean}±{deviation(values):.{places}f}"


def rows_of(entries: Iterable[Entry]) -> list[Row]:
    """Joins the entries of one method at one size, best of each size first, largest size first.

    Args:
        entries: Entries as in report.json, with `recipe` and `keep`; those with `error` are left
            out.
    """
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if "error" not in entry:
            groups.setdefault((entry["recipe"], str(entry["keep"])), []).append(entry)
    rows = [
        Row(
            name,
            keep,
            group[0]["experts_per_layer"],
            group[0]["num_bytes"],
            [entry["kl"]["mean"] for entry in group],
            [entry["perplexity"]["mean"] for entry in group],
            [entry["top1_agreement"] for entry in group],
            [sum(entry["seconds"].values()) for entry in group if entry["seconds"]],
        )
        for (name, keep), group in groups.items()
    ]
    return sorted(rows, key=lambda row: (-sum(row.experts_per_layer), row.keep, row.mean_kl))


def to_table(rows: Sequence[Row], title: str) -> Table:
    """Rows as a table for the screen, about 79 columns wide; long names are folded."""
    table = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column(_ON_SCREEN[0], overflow="fold")
    for column in _ON_SCREEN[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = row.to_cells()
        table.add_row(*(cells[column] for column in _ON_SCREEN))
    return table


def to_markdown(rows: Sequence[Row]) -> list[str]:
    """Rows as lines of a page."""
    head = "| " + " | ".join(_COLUMNS) + " |"
    rule = "| --- |" + " ---: |" * (len(_COLUMNS) - 1)
    return [head, rule, *("| " + " | ".join(row.to_cells().values()) + " |" for row in rows)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws KL against size, one line a method; bars are one standard deviation over seeds."""
    # Slow to import, and no other step draws.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row.name for row in rows)):
        line = sorted((row for row in rows if row.name == name), key=lambda row: row.num_bytes)
        axes.errorbar(
            [row.num_bytes / 1e6 for row in line],
            [row.mean_kl for row in line],
            [deviation(row.kl) for row in line],
            label=name,
            marker=_MARKERS[number % len(_MARKERS)],
            color=f"C{number % _COLOURS}",
            linestyle="--" if name.rpartition("/")[2].startswith("prune-") else "-",
            capsize=3,
        )
    axes.set_xlabel("size of the weights, MB")
    axes.set_ylabel("KL(original || model), nats a token")
    axes.grid(visible=True, alpha=0.3)
    if rows:
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    with replacing(path) as partial:
        # The same rows give the same bytes.
        figure.savefig(partial, format="png", dpi=120, metadata={"Software": None})
