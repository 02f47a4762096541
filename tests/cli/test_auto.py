"""`recipe: auto` settles on a recipe by the validation text, once."""

import json
from typing import Any

import pytest

from lightning_smoe import sweep as sweep_module
from lightning_smoe.compression.strategy import to_spec
from lightning_smoe.experiment import AUTO
from lightning_smoe.measure import measure
from tests.cli.command import Workplace

BASELINES = ["prune-frequency", "prune-reap"]
SHORT = {"data.calib_tokens": 512, "data.valid_tokens": 256}


@pytest.fixture
def auto(work: Workplace) -> Workplace:
    """An experiment that leaves the recipe open."""
    work.write({"model.recipe": "auto", **SHORT})
    return work


def runs(work: Workplace) -> dict[str, dict[str, Any]]:
    stored = json.loads((work.out / "sweep.json").read_text())
    assert stored["manifest"]["inputs"]["split"] == "valid"
    return {run["recipe"]: run for run in stored["runs"]}


def planned(work: Workplace) -> dict[str, Any]:
    plan = json.loads((work.out / "plan.json").read_text())
    recipe: dict[str, Any] = plan["manifest"]["inputs"]["recipe"]
    return recipe


def test_auto_plans_by_what_loses_least_and_is_not_tried_again(auto: Workplace) -> None:
    told = auto.done("plan").err
    tried = runs(auto)
    assert list(tried) == [*AUTO, *BASELINES]
    best = min(AUTO, key=lambda name: tried[name]["kl"]["mean"])
    kl = tried[best]["kl"]["mean"]
    assert f"recipe auto: {best} is taken, with a KL of {kl:.4f} on valid text" in told
    assert planned(auto) == to_spec(AUTO[best])
    before = (auto.out / "plan.json").read_bytes()
    told = auto.done("compress").err
    assert f"sweep: {len(tried)} of {len(tried)} runs are in out/sweep.json already" in told
    assert "sweep: run 1" not in told
    assert "plan: out/plan.json is there already" in told
    assert (auto.out / "compressed" / "config.json").exists()
    assert (
        json.loads(before)["layers"] == json.loads((auto.out / "plan.json").read_text())["layers"]
    )


def test_auto_takes_another_where_a_recipe_cannot_be_used(
    auto: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = AUTO["default"]

    def fails(trainer: Any, run: Any, *rest: Any) -> Any:
        if run.experiment.recipe == refused:
            raise ValueError("no such luck")
        return measure(trainer, run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "measure", fails)
        told = auto.done("plan").err
    assert "sweep: failed: default, keep 6, seed 42: no such luck" in told
    best = min(AUTO.keys() - {"default"}, key=lambda name: runs(auto)[name]["kl"]["mean"])
    assert planned(auto) == to_spec(AUTO[best])


def test_auto_works_in_one_process(auto: Workplace) -> None:
    words = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2"]
    auto.refused(r"works in one process, and trainer\.devices asks for 2", "plan", *words)


def test_auto_needs_validation_text(auto: Workplace) -> None:
    for file in (auto.folder / "text" / "valid").iterdir():
        file.unlink()
    auto.refused(r"valid", "plan")
