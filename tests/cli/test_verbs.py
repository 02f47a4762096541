"""Every verb once, end to end, and what a second run does."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_smoe.models.checkpoint import load
from tests.cli.command import Workplace, snapshot

WRITTEN_BY = {
    "calibrate": {"statistics.safetensors"},
    "plan": {"plan.json", "plan.safetensors"},
    "compress": {"compressed"},
    "fit": {"recovered", "training", "report.json", "report.md"},
}
BESIDE = {"config.yaml", "seconds.json", ".lock"}
CHECKPOINT_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "smoe.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def results(work: Workplace) -> dict[str, str]:
    """Hash of every file whose content follows from the experiment alone."""
    others = re.compile(r"config\.yaml|seconds\.json|report\..*|training/.*")
    return {k: "" if others.fullmatch(k) else v for k, v in snapshot(work.out).items()}


def test_each_verb_adds_its_own_result_and_all_at_once_give_the_same(
    work: Workplace, finished_once: Workplace
) -> None:
    expected = set(BESIDE)
    for verb, written in WRITTEN_BY.items():
        work.done(verb)
        expected |= written
        assert names(work.out) == expected
    assert names(work.out / "compressed") == CHECKPOINT_FILES
    assert names(work.out / "recovered") == CHECKPOINT_FILES
    assert names(work.folder) == {"model", "text", "experiment.yaml", "out"}
    one_by_one, at_once = results(work), results(finished_once)
    assert one_by_one.keys() == at_once.keys()
    assert {k: v for k, v in one_by_one.items() if at_once[k] != v} == {}


def test_a_verb_brings_the_steps_before_it(work: Workplace) -> None:
    work.done("plan")
    expected = WRITTEN_BY["calibrate"] | WRITTEN_BY["plan"] | BESIDE
    assert names(work.out) == expected
    shutil.rmtree(work.out)
    work.done("evaluate", "--model.baselines=false")
    assert names(work.out) == expected | {"compressed", "report.json", "report.md"}
    models = json.loads((work.out / "report.json").read_text())["models"]
    assert list(models) == ["compressed"]


def test_fit_takes_a_model_from_original_to_report(finished_once: Workplace) -> None:
    told = (finished_once.folder / "fit.err").read_text()
    for step in ("calibrate", "plan", "compress", "fit"):
        assert f"{step}: wrote out/" in told
    assert "compress: layer 2, 12 -> 6 experts" in told
    shown = (finished_once.folder / "fit.out").read_text()
    assert "Report: out/report.md" in shown
    assert "AutoModelForCausalLM.from_pretrained('out/recovered')" in shown
    model = AutoModelForCausalLM.from_pretrained(finished_once.out / "recovered")
    ours = load(finished_once.out / "recovered")
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(model(tokens).logits, ours(tokens).logits, rtol=0, atol=0)
    assert model.config.num_experts == 6


def test_the_report_has_the_promised_schema(finished_once: Workplace) -> None:
    report = json.loads((finished_once.out / "report.json").read_text())
    assert report["schema"] == 1
    assert report.keys() == {"schema", "teacher", "models", "manifest"}
    judged = ["compressed", "recovered", "prune-frequency", "prune-reap"]
    assert list(report["models"]) == judged
    for model in (report["teacher"], *report["models"].values()):
        check_model(model)
    teacher, compressed = report["teacher"], report["models"]["compressed"]
    assert teacher["kl"]["mean"] == 0
    assert teacher["top1_agreement"] == 1
    assert teacher["path"] == "model"
    assert teacher["experts_per_layer"] == [12, 12]
    assert compressed["path"] == "out/compressed"
    assert compressed["experts_per_layer"] == [6, 6]
    weights = finished_once.out / "compressed" / "model.safetensors"
    assert compressed["num_bytes"] == weights.stat().st_size
    model = load(finished_once.out / "compressed")
    assert compressed["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert compressed["seconds"].keys() == {"calibrate", "plan", "compress"}
    assert report["models"]["recovered"]["seconds"].keys() == {"fit"}
    assert report["models"]["prune-reap"]["path"] is None


def check_model(model: dict[str, Any]) -> None:
    kinds: dict[str, type | tuple[type, ...]] = {
        "path": (str, type(None)),
        "num_parameters": int,
        "num_bytes": int,
        "experts_per_layer": list,
        "perplexity": dict,
        "kl": dict,
        "top1_agreement": float,
        "tasks": dict,
        "seconds": dict,
    }
    assert list(model) == list(kinds)
    for key, kind in kinds.items():
        assert isinstance(model[key], kind), key
    for key in ("perplexity", "kl"):
        assert list(model[key]) == ["mean", "domains"]
        assert list(model[key]["domains"]) == ["arith", "lit"]
        assert all(isinstance(v, float) for v in model[key]["domains"].values())
    domains = model["perplexity"]["domains"].values()
    nats = [math.log(value) for value in domains]
    assert math.isclose(model["perplexity"]["mean"], math.exp(sum(nats) / len(nats)))
    divergences = model["kl"]["domains"].values()
    assert math.isclose(model["kl"]["mean"], sum(divergences) / 2)


def test_a_second_run_skips_every_step_and_says_so(finished: Workplace) -> None:
    before = snapshot(finished.out)
    told = finished.done("fit").err
    for step, result in (
        ("calibrate", "statistics.safetensors"),
        ("plan", "plan.json"),
        ("compress", "compressed"),
        ("fit", "recovered"),
        ("evaluate", "report.json"),
    ):
        assert f"{step}: out/{result} is there already, made from the same inputs" in told
    assert "wrote" not in told
    after = snapshot(finished.out)
    assert after.pop("config.yaml") != before.pop("config.yaml")  # trainer.logger
    assert after == before


def test_a_skipped_evaluation_still_shows_its_table(finished: Workplace) -> None:
    shown = finished.done("evaluate").out
    for name in ("original", "compressed", "recovered", "prune-frequency", "prune-reap"):
        assert f" {name} " in shown


@pytest.mark.parametrize(
    ("change", "verb", "named"),
    [
        ("--model.keep=8", "fit", "keep"),
        ("--model.layers=[2]", "compress", "layers"),
        ("--model.recipe.refit=null", "compress", "recipe"),
        ("--model.recipe.saliency=Frequency", "compress", "recipe"),
        ("--data.calib_tokens=512", "calibrate", "calibration text"),
        ("--model.dtype=bfloat16", "calibrate", "dtype"),
        ("--model.recovery.learning_rate=0.1", "fit", "recovery"),
        ("--trainer.max_steps=6", "fit", "trainer"),
        ("--data.valid_tokens=256", "fit", "validation text"),
    ],
)
def test_a_changed_setting_is_refused_naming_what_differs(
    finished: Workplace, change: str, verb: str, named: str
) -> None:
    match = rf"holds the result of another run \(different: {named}\); .*model\.overwrite"
    finished.refused(match, verb, change)


@pytest.mark.slow
def test_overwrite_runs_every_step_again_where_the_settings_changed(finished: Workplace) -> None:
    told = finished.done("fit", "--model.keep=8", "--model.overwrite=true").err
    for step in ("calibrate", "plan", "compress", "fit"):
        assert f"{step}: wrote" in told
    assert "there already" not in told
    report = json.loads((finished.out / "report.json").read_text())
    assert report["models"]["recovered"]["experts_per_layer"] == [8, 8]
    assert report["models"]["prune-reap"]["experts_per_layer"] == [8, 8]


def test_overwrite_with_the_same_settings_gives_the_same_bytes(finished: Workplace) -> None:
    before = snapshot(finished.out)
    told = finished.done("compress", "--model.overwrite=true").err
    after = snapshot(finished.out)
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed <= {"config.yaml", "seconds.json"}
    assert "compress: wrote" in told


def test_an_evaluation_of_new_text_replaces_the_report(finished: Workplace) -> None:
    before = json.loads((finished.out / "report.json").read_text())
    finished.done("evaluate", "--data.test_tokens=256")
    after = json.loads((finished.out / "report.json").read_text())
    assert before["teacher"]["perplexity"] != after["teacher"]["perplexity"]
    assert before["teacher"]["num_bytes"] == after["teacher"]["num_bytes"]


def test_other_checkpoints_are_judged_beside_the_results(finished: Workplace) -> None:
    (finished.out / "compressed").rename(finished.folder / "mine")
    finished.done("evaluate", "--others", '["mine", "model"]')
    models = json.loads((finished.out / "report.json").read_text())["models"]
    assert models["mine"]["kl"] == models["compressed"]["kl"]
    assert models["model"]["kl"]["mean"] == 0
    assert models["mine"]["path"] == "mine"
    assert "| mine |" in (finished.out / "report.md").read_text()
