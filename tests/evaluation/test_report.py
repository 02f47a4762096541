"""The report as file, page and table."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_smoe.evaluation.perplexity import Quality
from lightning_smoe.evaluation.report import (
    Judged,
    to_markdown,
    to_table,
    to_task_table,
    write_report,
)
from lightning_smoe.models.artifact import Manifest

NAMES = ("compressed", "recovered", "prune-frequency", "prune-reap")


def entry(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "path": Path("runs/first/compressed"),
        "num_parameters": 5_930_000,
        "num_bytes": 13_500_000,
        "experts_per_layer": [30, 30],
        "quality": Quality({"arith": 1.0, "lit": 3.0}, {"arith": 0.1, "lit": 0.3}, 0.781),
        "seconds": {"compress": 6.123},
    }
    return Judged(**(values | changes)).to_json()


def teacher() -> dict[str, Any]:
    quality = Quality({"arith": 0.9, "lit": 2.9}, {"arith": 0.0, "lit": 0.0}, 1.0)
    return entry(quality=quality, experts_per_layer=[60, 60], seconds={})


def shown(models: dict[str, dict[str, Any]], width: int = 80) -> list[str]:
    console = Console(width=width, record=True)
    with console.capture() as capture:
        console.print(to_table(teacher(), models))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_an_entry_says_all_that_the_schema_promises() -> None:
    assert entry() == {
        "path": "runs/first/compressed",
        "num_parameters": 5_930_000,
        "num_bytes": 13_500_000,
        "experts_per_layer": [30, 30],
        "perplexity": {
            "mean": pytest.approx(7.38906),
            "domains": pytest.approx({"arith": 2.71828, "lit": 20.08554}),
        },
        "kl": {"mean": pytest.approx(0.2), "domains": {"arith": 0.1, "lit": 0.3}},
        "top1_agreement": 0.781,
        "tasks": {},
        "seconds": {"compress": 6.1},
    }
    assert entry(path=None)["path"] is None


def test_the_report_is_json_with_schema_teacher_models_and_manifest(tmp_path: Path) -> None:
    models = {name: entry() for name in NAMES}
    manifest = Manifest("evaluate", {"test text": "abc"})
    write_report(tmp_path, teacher(), models, manifest)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored == {
        "schema": 1,
        "teacher": teacher(),
        "models": models,
        "manifest": manifest.to_json(),
    }
    assert (tmp_path / "report.md").read_text() == to_markdown(teacher(), models)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_the_page_has_every_model_and_every_domain() -> None:
    page = to_markdown(teacher(), {name: entry() for name in NAMES})
    overview, by_domain, perplexity = page.split("\n## ")[:3]
    assert by_domain.startswith("KL by domain")
    assert perplexity.startswith("Perplexity by domain")
    for name in NAMES:
        for part in (overview, by_domain, perplexity):
            assert f"\n| {name} | " in part
    assert "| model | arith | lit |" in by_domain
    assert "| original | 2.46 | 18.17 |" in perplexity
    assert "compressed: compress 6.1" in page
    for table in (overview, by_domain, perplexity):
        counts = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(counts) == 1


def test_the_table_prints_under_eighty_columns_without_cut_words() -> None:
    lines = shown({name: entry() for name in NAMES})
    assert max(map(len, lines)) < 80
    text = "\n".join(lines)
    assert "…" not in text
    for name in ("original", *NAMES):
        assert f" {name} " in text
    for number in ("5.93 M", "7.39", "0.2000", "78.1%", "60", "30"):
        assert f" {number} " in text


def test_the_table_holds_large_and_hopeless_models() -> None:
    quality = Quality({"arith": 900.0, "lit": 800.0}, {"arith": 900.0, "lit": 800.0}, 0.0)
    large = entry(num_parameters=30_532_122_624, experts_per_layer=[128, 64, 128])
    lines = shown({"prune-frequency": large, "prune-reap": entry(quality=quality)})
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "…" not in text
    for word in (" 30.53 B ", " 64-128 ", " inf "):
        assert word in text


def test_a_long_name_is_folded_not_cut() -> None:
    name = "qwen3-30b-a3b-pruned-to-64-experts-by-hand"
    lines = shown({"compressed": entry(), name: entry()})
    assert max(map(len, lines)) <= 80
    first_cells = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert name in "".join(first_cells)


def test_divergence_is_shown_relative_to_reap_pruning_where_that_was_judged() -> None:
    half = Quality({"arith": 1.0, "lit": 3.0}, {"arith": 0.05, "lit": 0.15}, 0.8)
    page = to_markdown(teacher(), {"compressed": entry(quality=half), "prune-reap": entry()})
    assert "| compressed | 30 | 5.93 M | 7.39 | 0.1000 | 0.50 | 80.0% |" in page
    assert "| prune-reap | 30 | 5.93 M | 7.39 | 0.2000 | 1.00 | 78.1% |" in page
    alone = to_markdown(teacher(), {"compressed": entry(quality=half)})
    assert "| compressed | 30 | 5.93 M | 7.39 | 0.1000 |  | 80.0% |" in alone


SCORES = {"arc": {"acc": 0.397, "acc_stderr": 0.0155}, "gsm8k": {"match,strict": 0.5}}


def test_scores_on_tasks_stand_on_the_page_and_in_a_table_where_there_are_any() -> None:
    judged = teacher() | {"tasks": SCORES}
    models = {"compressed": entry(tasks={"arc": {"acc": 0.34, "acc_stderr": 0.015}})}
    page = to_markdown(judged, models)
    assert "| task | original | compressed |" in page
    assert "| arc acc | 39.7 ± 1.6 | 34.0 ± 1.5 |" in page
    assert "| gsm8k match,strict | 50.0 |  |" in page
    assert "## Tasks" not in to_markdown(teacher(), {"compressed": entry()})
    console = Console(width=80, record=True)
    with console.capture() as capture:
        console.print(to_task_table(judged, models))
    for cell in ("arc acc", "39.7 ± 1.6", "34.0 ± 1.5", "gsm8k match,strict"):
        assert cell in capture.get()
