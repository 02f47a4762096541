"""A task of two questions in local files, as lm-evaluation-harness reads it."""

import json
from pathlib import Path

import yaml

# The beginning and end of two sentences of the shipped text, and a wrong end for each.
QUESTIONS = [
    {"question": "It is a truth universally", "choices": [" acknowledged", " tomato"], "answer": 0},
    {"question": "from pathlib import", "choices": [" tomato", " Path"], "answer": 1},
]


def write_task(folder: Path, name: str) -> None:
    """Writes the questions and the task's file into a folder."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(question) for question in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
