"""Two hundred random mutations of what people write: one message each, and nothing half-written."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_smoe.cli import main
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.errors import InputError
from lightning_smoe.models.checkpoint import load, outline
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.residence import InMemory
from lightning_smoe.models.trial_run import check_runs
from tests.cli.command import EXPERIMENT, Outcome, Workplace, check_refusal, run_in, snapshot
from tests.compression.plans import whole_plan
from tests.faults.mutations import mutations
from tests.models.pruning import load_stock

# Characters: longer is a page that nobody reads.
LONGEST = 1500


def check_ended(outcome: Outcome, case: Any) -> None:
    """Checks that a command succeeded, or ended with code 2 and one paragraph."""
    assert outcome.code in (0, 2), (case, outcome)
    if outcome.code:
        message = check_refusal(outcome, "").strip()
        assert 10 < len(message) < LONGEST, (case, message)


def is_refused(read: Callable[[], None]) -> bool:
    """Whether reading something ends with one paragraph; any other error is a failure."""
    try:
        read()
    except InputError as error:
        message = str(error)
    else:
        return False
    assert 10 < len(message) < LONGEST, message
    return True


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_a_mutated_config_is_read_or_refused(
    family: str, saved_checkpoint: Callable[[str], Path]
) -> None:
    folder = saved_checkpoint(family)
    config = folder / "config.json"
    refused = 0
    for case in mutations(json.loads(config.read_text()), seed=7, count=26):
        config.write_text(json.dumps(case))
        outcome = run_in(folder.parent, main, "inspect", folder)
        check_ended(outcome, case)
        if outcome.code:
            refused += 1
            continue
        refused += is_refused(lambda: check_runs(InMemory(load(folder))))
    assert 4 < refused < 26


def test_a_mutated_plan_is_read_or_refused(tmp_path: Path, work: Workplace) -> None:
    layers = find_moe_layers(outline(open_checkpoint(work.folder / "model")))
    path = tmp_path / "plan.json"
    whole_plan().save(path)
    refused = 0
    for case in mutations(json.loads(path.read_text()), seed=3, count=92):
        path.write_text(json.dumps(case))
        refused += is_refused(lambda: CompressionPlan.load(path).check(layers, ""))
    assert 30 < refused < 92


def test_a_mutated_experiment_is_refused_before_anything_is_written(work: Workplace) -> None:
    # Found missing last of all, so that whatever passes every other check ends there.
    shutil.rmtree(work.folder / "text/calib")
    before = snapshot(work.folder)
    del before["experiment.yaml"]
    for case in mutations(EXPERIMENT, seed=5, count=30):
        (work.folder / "experiment.yaml").write_text(yaml.safe_dump(case))
        outcome = work.do("calibrate", "--data.path=text")
        assert outcome.code == 2, (case, outcome)
        check_ended(outcome, case)
        after = snapshot(work.folder)
        del after["experiment.yaml"]
        assert after == before, case


def test_a_model_that_runs_passes_its_trial(saved_checkpoint: Callable[[str], Path]) -> None:
    model = load_stock(saved_checkpoint("gpt_oss"))
    check_runs(InMemory(model))
    with torch.no_grad():
        model.get_input_embeddings().weight[1] = math.nan  # type: ignore[operator]
    with pytest.raises(InputError, match=r"gives states that are NaN or infinite, in torch\.float"):
        check_runs(InMemory(model))
