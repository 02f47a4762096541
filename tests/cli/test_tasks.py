"""evaluate --tasks: accuracy of every model of the report."""

import json
from pathlib import Path

import pytest

from tests.cli.command import Workplace
from tests.evaluation.questions import write_task


@pytest.fixture
def own_tasks(work: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task, named endings."""
    pytest.importorskip("lm_eval", reason="needs the extra eval: pip install -e '.[eval]'")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_task(work.folder / "tasks", "endings")
    return work.folder / "tasks"


@pytest.mark.slow
def test_every_model_of_the_report_is_judged_on_tasks_which_later_reports_keep(
    work: Workplace, own_tasks: Path
) -> None:
    options = ["--task_path", "tasks", "--num_fewshot=1", "--model.keep", "8"]
    outcome = work.done("evaluate", "--tasks", "endings", *options)
    assert "endings acc" in outcome.out
    report = json.loads((work.out / "report.json").read_text())
    models = {"original": report["teacher"], **report["models"]}
    assert models.keys() == {"original", "compressed", "prune-frequency", "prune-reap"}
    for model in models.values():
        assert model["tasks"]["endings"].keys() == {"acc", "acc_stderr"}
    page = (work.out / "report.md").read_text()
    assert "## Tasks" in page
    assert "| task | original | compressed | prune-frequency | prune-reap |" in page
    assert "| endings acc | " in page
    saved = (work.out / "config.yaml").read_text()
    assert "task_path" not in saved

    again = work.done("evaluate", "--model.keep", "8")
    assert "is there already" in again.err
    assert "endings acc" in again.out
    (own_tasks / "questions.jsonl").write_text('{"question": "a", "choices": ["b"], "answer": 0}\n')
    other = work.done("evaluate", "--tasks", "endings", *options[:2], "--model.keep", "8")
    assert "is there already, made from the same inputs" not in other.err.splitlines()[-1]
    report = json.loads((work.out / "report.json").read_text())
    assert report["teacher"]["tasks"] == {"endings": {"acc": 1.0}}


@pytest.mark.slow
def test_unknown_tasks_are_refused_before_work(work: Workplace, own_tasks: Path) -> None:
    work.refused(
        r"no task endngs; did you mean endings\?",
        *("evaluate", "--task_path", "tasks", "--tasks", "endings", "endngs"),
    )


def test_options_of_tasks_without_tasks_are_refused(work: Workplace) -> None:
    work.refused("change nothing without --tasks", "evaluate", "--limit", "10")
