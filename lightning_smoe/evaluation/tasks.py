"""Accuracy on tasks of lm-evaluation-harness, of a model in memory."""

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_smoe.errors import InputError
from lightning_smoe.models.artifact import sha256_of_file

TaskResults = dict[str, dict[str, float]]


@dataclass(frozen=True)
class TaskSuite:
    """Tasks on which models are judged, each by its own metrics.

    Every process runs all of them: several GPUs are no faster here.

    Args:
        names: Tasks, groups or tags of lm-evaluation-harness, or of `folder`; at least one.
        limit: Questions of each task, and of each task of a group, from its beginning; none takes
            all.
        num_fewshot: Solved examples before each question, 0 or more. Tasks whose file says 0
            stay without.
        batch_size: Answers the model reads at a time, 1 or more.
        folder: Folder with task files (YAML) of your own, which go before those of the same name.
    """

    names: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int = 0
    batch_size: int = 8
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit {self.limit} leaves no question; give 1 or more")
        if self.num_fewshot < 0:
            raise InputError(f"--num_fewshot {self.num_fewshot} must be 0 or more")
        if self.batch_size < 1:
            raise InputError(f"--task_batch_size {self.batch_size} must be 1 or more")
        if self.folder is not None and not self.folder.is_dir():
            raise InputError(f"--task_path {self.folder}: there is no such folder")

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides the results, beside the model."""
        files = sorted(p for p in self.folder.rglob("*") if p.is_file()) if self.folder else []
        return {
            "names": sorted(self.names),
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "files": [sha256_of_file(path) for path in files],
        }

    def check(self) -> None:
        """Finds every task and fetches its questions, before any work.

        Raises:
            InputError: lm-eval is not installed, a task is unknown, or has no questions to fetch.
        """
        known = self._manager.all_tasks
        for name in self.names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else "; `lm-eval ls tasks` lists them"
                raise InputError(f"--tasks: there is no task {name}{hint}")
        errors: tuple[type[Exception], ...] = (OSError, ValueError, _datasets_error())
        try:
            with _quiet():
                self._manager.load(list(self.names))
        except errors as error:
            raise InputError(
                f"--tasks: the questions of {', '.join(self.names)} cannot be read: "
                f"{str(error).splitlines()[0]}; fetch them once with the network (they stay in the "
                "cache of the Hugging Face hub), or name a --task_path whose tasks read local files"
            ) from error

    @cached_property
    def _manager(self) -> Any:
        tasks = _harness().tasks
        with _quiet():
            if self.folder is not None:
                # To list the thousands of shipped tasks takes ten seconds.
                own = tasks.TaskManager(include_path=str(self.folder), include_defaults=False)
                if set(self.names) <= set(own.all_subtasks):
                    return own
            return tasks.TaskManager(include_path=self.folder and str(self.folder))

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TaskResults:
        """Judges a model on the device where it lies, without a chat template.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.

        Returns:
            For each task or group its metrics by name (with the filter of the answers where there
            is one, as in `exact_match,strict`), and behind `_stderr` their standard errors. Parts
            of a group are left out. Empty on other processes than the first of a machine.
        """
        harness = _harness()
        with _quiet():
            wrapped = harness.models.huggingface.HFLM(
                pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=self.batch_size
            )
            found = harness.simple_evaluate(
                wrapped,
                tasks=list(self.names),
                limit=self.limit,
                num_fewshot=self.num_fewshot,
                task_manager=self._manager,
                log_samples=False,
            )
        if found is None:
            return {}
        parts = {part for parts in found["group_subtasks"].values() for part in parts}
        return {
            name: _metrics(values) for name, values in found["results"].items() if name not in parts
        }


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Keeps the numbers of a task whose keys are `metric,filter`."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        # Where a metric has no standard error there is a word.
        if "," in key and isinstance(value, int | float)
    }


def _harness() -> ModuleType:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise InputError(
            f"evaluation on tasks needs lm-eval ({error}): pip install 'lightning-smoe[eval]'"
        ) from error
    module: ModuleType = lm_eval
    return module


def _datasets_error() -> type[Exception]:
    # Slow to import, and here only where lm-eval has imported it.
    from datasets.exceptions import DatasetsError

    error: type[Exception] = DatasetsError
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what the harness says about every model that is in memory."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
