"""Tasks of lm-evaluation-harness, on models in memory and without the network."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_smoe.data.packing import load_tokenizer
from lightning_smoe.errors import InputError
from lightning_smoe.evaluation.tasks import TaskSuite, _metrics
from lightning_smoe.models.checkpoint import load
from tests.conftest import SHIPPED_CHECKPOINT
from tests.evaluation.questions import QUESTIONS, write_task


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task, named endings."""
    pytest.importorskip("lm_eval", reason="needs the extra eval: pip install -e '.[eval]'")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_task(tmp_path / "tasks", "endings")
    return tmp_path / "tasks"


def log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, choice: str
) -> float:
    """Sum over the answer's tokens, one after the other."""
    start = len(tokenizer(question, add_special_tokens=False).input_ids)
    tokens = tokenizer(question + choice, add_special_tokens=False).input_ids
    total = 0.0
    for place in range(start, len(tokens)):
        logits = model(torch.tensor([tokens[:place]])).logits[0, -1]
        total += logits.log_softmax(-1)[tokens[place]].item()
    return total


@torch.no_grad()
def test_accuracy_is_how_often_the_right_answer_is_the_likeliest(folder: Path) -> None:
    model, tokenizer = load(SHIPPED_CHECKPOINT), load_tokenizer(SHIPPED_CHECKPOINT)
    right = 0
    for entry in QUESTIONS:
        scores = [
            log_likelihood(model, tokenizer, str(entry["question"]), choice)
            for choice in list(entry["choices"])  # type: ignore[call-overload] # text and lists
        ]
        right += scores.index(max(scores)) == entry["answer"]
    suite = TaskSuite(("endings",), folder=folder)
    suite.check()
    found = suite.run(model, tokenizer)
    assert found["endings"].keys() == {"acc", "acc_stderr"}
    assert found["endings"]["acc"] == right / len(QUESTIONS)
    assert TaskSuite(("endings",), limit=1, folder=folder).run(model, tokenizer)["endings"] == {
        "acc": 1.0
    }


@pytest.mark.slow
def test_a_group_is_one_row_without_its_parts(folder: Path) -> None:
    model, tokenizer = load(SHIPPED_CHECKPOINT), load_tokenizer(SHIPPED_CHECKPOINT)
    write_task(folder, "more_endings")
    metric = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
    (folder / "all.yaml").write_text(f"group: all_endings\ntask: [endings, more_endings]\n{metric}")
    found = TaskSuite(("all_endings",), folder=folder).run(model, tokenizer)
    assert found.keys() == {"all_endings"}
    assert 0 <= found["all_endings"]["acc"] <= 1


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_a_guess(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no task arc_chalenge; did you mean arc_challenge\?"):
        TaskSuite(("endings", "arc_chalenge"), folder=folder).check()


def test_questions_that_cannot_be_read_are_refused(folder: Path) -> None:
    (folder / "questions.jsonl").unlink()
    with pytest.raises(InputError, match="the questions of endings cannot be read"):
        TaskSuite(("endings",), folder=folder).check()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'lightning-smoe\[eval\]'"):
        TaskSuite(("arc_easy",)).check()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"limit": 0}, "--limit 0"),
        ({"num_fewshot": -1}, "--num_fewshot -1"),
        ({"batch_size": 0}, "--task_batch_size 0"),
        ({"folder": Path("none")}, "--task_path none"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, int], match: str) -> None:
    with pytest.raises(InputError, match=match):
        TaskSuite(("arc_easy",), **options)  # type: ignore[arg-type] # one option at a time


def test_results_depend_on_the_files_of_own_tasks(tmp_path: Path) -> None:
    write_task(tmp_path, "endings")
    suite = TaskSuite(("endings",), folder=tmp_path)
    before = suite.inputs
    assert suite.inputs == before
    (tmp_path / "questions.jsonl").write_text("{}")
    assert suite.inputs != before


def test_only_numbers_are_kept_and_filters_are_named() -> None:
    values = {"alias": "x", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": "N/A"}
    assert _metrics(values) == {"acc": 0.5}
    assert _metrics({"match,strict": 1, "match_stderr,strict": 0.25}) == {
        "match,strict": 1.0,
        "match_stderr,strict": 0.25,
    }
