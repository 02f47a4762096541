"""Finished runs side by side: one table, one original, nothing written unasked."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Outcome, Workplace, check_refusal, snapshot


def entry(kl: float, **changes: Any) -> dict[str, Any]:
    values = {
        "num_parameters": 4,
        "num_bytes": 2_000_000,
        "experts_per_layer": [6, 6],
        "perplexity": {"mean": 10 + kl, "domains": {"lit": 10 + kl}},
        "kl": {"mean": kl, "domains": {"lit": kl}},
        "top1_agreement": 0.5,
        "seconds": {"plan": 1.0, "compress": 2.0},
    }
    return {**values, **changes}


def write_sweep(folder: Path, runs: list[dict[str, Any]], **inputs: str) -> None:
    made_from = {"checkpoint": "a" * 64, "split": "valid", "held-out text": "t", **inputs}
    manifest = {"step": "sweep", "inputs": made_from, "versions": {}}
    folder.mkdir()
    content = {"schema": 1, "teacher": entry(0.0), "runs": runs, "manifest": manifest}
    (folder / "sweep.json").write_text(json.dumps(content))


def write_report(folder: Path, models: dict[str, Any], **inputs: str) -> None:
    made_from = {"checkpoint": "a" * 64, "test text": "s", **inputs}
    manifest = {"step": "evaluate", "inputs": made_from, "versions": {}}
    folder.mkdir()
    content = {"schema": 1, "teacher": entry(0.0), "models": models, "manifest": manifest}
    (folder / "report.json").write_text(json.dumps(content))


@pytest.fixture
def runs(tmp_path: Path) -> Workplace:
    """A folder with two runs of one original."""
    key = {"recipe": "mine", "keep": 6}
    failed = {"recipe": "mine", "keep": 1, "seed": 0, "error": "too few"}
    tried = [entry(0.1, **key, seed=0), entry(0.2, **key, seed=1), failed]
    write_sweep(tmp_path / "tried", tried)
    recovered = entry(0.05, seconds={"fit": 60.0})
    write_report(tmp_path / "whole", {"recovered": recovered, "prune-reap": entry(0.3, seconds={})})
    return Workplace(tmp_path)


def cells(outcome: Outcome, name: str) -> list[str]:
    assert outcome.code == 0, outcome.err
    return next(line.split() for line in outcome.out.splitlines() if f" {name} " in line)


def test_runs_stand_in_one_table_with_the_spread_over_seeds(runs: Workplace) -> None:
    before = snapshot(runs.folder)
    shown = runs.run("compare", "tried", "whole")
    assert snapshot(runs.folder) == before
    expected = ["tried/mine", "6", "0.1500±0.0707", "10.15±0.07", "50.0%", "3.0", "2.00"]
    assert cells(shown, "tried/mine") == expected
    expected = ["whole/recovered", "6", "0.0500", "10.05", "50.0%", "60.0", "2.00"]
    assert cells(shown, "whole/recovered") == expected
    assert cells(shown, "whole/prune-reap") == [
        "whole/prune-reap",
        "6",
        "0.3000",
        "10.30",
        "50.0%",
        "2.00",
    ]
    assert "Compare within these groups only" in shown.out
    assert "tried/sweep.json; whole/report.json" in shown.out


def test_a_page_and_a_picture_are_written_on_request(runs: Workplace) -> None:
    runs.run("compare", "tried", "whole", "--output", "side/by/side")
    folder = runs.folder / "side" / "by" / "side"
    assert {path.name for path in folder.iterdir()} == {"compare.md", "compare.png"}
    page = (folder / "compare.md").read_text()
    assert "| tried/mine | 6 | 6 | 0.1500±0.0707 | 10.15±0.07 | 50.0% | 3.0 | 2.00 | 2 |" in page
    assert "no text" not in page
    first = snapshot(folder)
    runs.run("compare", "tried", "whole", "--output", "side/by/side")
    assert snapshot(folder) == first


def test_runs_of_different_originals_are_not_mixed(runs: Workplace) -> None:
    write_sweep(runs.folder / "other", [], checkpoint="b" * 64)
    outcome = runs.run("compare", "tried", "other", "--output", "x")
    match = r"different originals.*tried/sweep\.json of aaaaaaaaaaaa, .*other.*of bbbbbbbbbbbb"
    check_refusal(outcome, match)
    assert not (runs.folder / "x").exists()


def test_folders_of_one_name_are_told_apart_and_one_folder_counts_once(runs: Workplace) -> None:
    (runs.folder / "more").mkdir()
    key = {"recipe": "mine", "keep": 6, "seed": 0}
    write_sweep(runs.folder / "more" / "tried", [entry(0.4, **key)])
    shown = runs.run("compare", "tried", "more/tried", "more/../tried")
    assert cells(shown, "more/tried/mine")[2] == "0.4000"
    assert cells(shown, "more/../tried/mine")[2] == "0.1500±0.0707"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["nowhere"], r"nowhere has no report\.json and no sweep\.json"),
        (["broken"], r"broken/report\.json is not a result of this version"),
        (["tried", "--output", "tried/sweep.json"], r"--output tried/sweep\.json is a file"),
        ([], r"arguments are required: --runs"),
        (["[]"], r"name at least one folder"),
    ],
)
def test_what_is_no_run_is_refused(words: list[str], match: str, runs: Workplace) -> None:
    (runs.folder / "broken").mkdir()
    (runs.folder / "broken" / "report.json").write_text('{"models": {}}')
    check_refusal(runs.run("compare", *words), match)


def test_a_real_report_is_read(finished: Workplace) -> None:
    shown = finished.run("compare", "out")
    report = json.loads((finished.out / "report.json").read_text())
    for name, model in report["models"].items():
        assert cells(shown, f"out/{name}")[2] == f"{model['kl']['mean']:.4f}"
