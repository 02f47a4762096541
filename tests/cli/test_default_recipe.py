"""The default recipe from the command line: pooled neurons under a router that keeps its rows."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from tests.cli.command import Workplace, snapshot

FAMILIES = ("qwen3_moe", "deepseek_v3")
DEFAULT = {"model.recipe": ..., "data.calib_tokens": 512}
TOO_FEW = "the plan keeps 2 experts but the router selects top_k=4; keep at least 4"

Fill = Callable[[Path, str], Workplace]


def read(path: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(path.read_text())
    return stored


@pytest.mark.parametrize("family", FAMILIES)
def test_the_verbs_in_turn_give_folders_that_load_without_remote_code(
    family: str, new_workplace: Fill, tmp_path: Path
) -> None:
    work = new_workplace(tmp_path / "work", family)
    # DeepSeek's router needs four experts in each of its two blocks to choose from.
    keep = 8 if family == "deepseek_v3" else 6
    work.write({**DEFAULT, "model.keep": keep})
    for verb in ("calibrate", "plan", "compress", "evaluate"):
        assert f"{verb}: wrote out/" in work.done(verb).err or verb == "evaluate"
    shown = work.done("fit").out
    assert "from_pretrained('out/recovered', trust_remote_code=True)" in shown
    for name in ("compressed", "recovered"):
        check_folder(work.out / name, family, [keep, keep])
    models = read(work.out / "report.json")["models"]
    assert list(models) == ["compressed", "recovered", "prune-frequency", "prune-reap"]
    assert models["compressed"]["experts_per_layer"] == [keep, keep]
    plan = read(work.out / "plan.json")
    assert plan["router"]["class_path"].endswith(".Map")
    assert plan["merger"]["class_path"].endswith(".NeuronPool")
    assert list(plan["refits"]) == [layer["name"] for layer in plan["layers"]]
    before = snapshot(work.out)
    told = work.done("fit").err
    for verb in ("calibrate", "plan", "compress", "fit", "evaluate"):
        assert re.search(rf"^{verb}: out/\S+ is there already", told, re.MULTILINE)
    assert "wrote" not in told
    assert snapshot(work.out) == before


def check_folder(path: Path, family: str, counts: list[int]) -> None:
    """Checks that stock transformers loads the folder here as this project does."""
    folder = open_checkpoint(path)
    assert folder.is_mapped
    assert folder.config["model_type"] == f"mapped_{family}"
    model = AutoModelForCausalLM.from_pretrained(path)
    ours = load(path)
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(model(tokens).logits, ours(tokens).logits, rtol=0, atol=0)
    assert [layer.num_experts for layer in find_moe_layers(ours)] == counts


@pytest.fixture(scope="session")
def pooled_once(new_workplace: Fill, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A compression by the default recipe; not to be changed by tests."""
    work = new_workplace(tmp_path_factory.mktemp("pooled") / "work", "qwen3_moe")
    work.write(DEFAULT)
    work.done("compress")
    return work


@pytest.fixture
def pooled(pooled_once: Workplace, tmp_path: Path) -> Workplace:
    """A copy of it."""
    shutil.copytree(pooled_once.folder, tmp_path / "pooled")
    return Workplace(tmp_path / "pooled")


def test_a_mapped_folder_is_inspected_and_continues_a_prompt(pooled_once: Workplace) -> None:
    shown = pooled_once.run("inspect", "out/compressed")
    assert shown.code == 0, shown.err
    assert shown.out.count(": 6 experts") == 2
    written = pooled_once.run(
        "generate", "out/compressed", "--prompt", "The sea", "--max_new_tokens", "3"
    )
    assert written.code == 0, written.err
    assert written.out.startswith("The sea")


def test_a_mapped_folder_is_not_compressed_again(pooled: Workplace) -> None:
    words = ["--model.checkpoint=out/compressed", "--model.output_dir=again", "--model.keep=4"]
    pooled.refused(r"share experts already; compress the original", "calibrate", *words)


def test_fewer_experts_than_the_router_selects_can_be_kept(pooled: Workplace) -> None:
    words = ["--model.keep=2", "--model.output_dir=few"]
    pooled.done("compress", *words)
    model = load(pooled.folder / "few" / "compressed")
    assert [layer.num_experts for layer in find_moe_layers(model)] == [2, 2]
    told = pooled.done("evaluate", *words).err
    for name in ("prune-frequency", "prune-reap"):
        assert f"evaluate: {name} is left out: model.layers.0.mlp: {TOO_FEW}" in told
    assert list(read(pooled.folder / "few/report.json")["models"]) == ["compressed"]
    again = pooled.done("evaluate", *words).err
    assert "report.json is there already" in again


PRUNE = "lightning_smoe.compression.recipe.Prune"
BESIDE = {"stock": {"class_path": PRUNE}}


def test_recipes_beside_stand_in_the_report_at_the_same_size(pooled: Workplace) -> None:
    pooled.write({**DEFAULT, "model.beside": BESIDE, "model.baselines": False})
    shown = pooled.done("evaluate").out
    assert " stock " in shown
    models = read(pooled.out / "report.json")["models"]
    assert list(models) == ["compressed", "stock"]
    assert models["stock"]["path"] is None
    assert models["stock"]["experts_per_layer"] == [6, 6]
    # The same numbers as when it is the recipe itself.
    pooled.write({"data.calib_tokens": 512, "model.output_dir": "own", "model.baselines": False})
    pooled.done("evaluate")
    own = read(pooled.folder / "own" / "report.json")["models"]["compressed"]
    assert own["kl"] == models["stock"]["kl"]
    # Another recipe beside makes the report out of date.
    other = {"stock": {"class_path": PRUNE, "init_args": {"refit": None}}}
    pooled.write({**DEFAULT, "model.beside": other, "model.baselines": False})
    told = pooled.done("evaluate").err
    assert "report.json is there already" not in told
    assert read(pooled.out / "report.json")["models"]["stock"]["kl"] != models["stock"]["kl"]


def test_a_recipe_beside_that_cannot_keep_so_few_experts_is_left_out(pooled: Workplace) -> None:
    pooled.write({**DEFAULT, "model.beside": BESIDE, "model.baselines": False, "model.keep": 2})
    told = pooled.done("evaluate", "--model.output_dir=few").err
    assert f"evaluate: stock is left out: model.layers.0.mlp: {TOO_FEW}" in told
    assert list(read(pooled.folder / "few" / "report.json")["models"]) == ["compressed"]


@pytest.mark.parametrize("name", ["recovered", "prune-reap"])
def test_a_recipe_beside_does_not_take_the_name_of_another_model(
    name: str, pooled: Workplace
) -> None:
    pooled.write({**DEFAULT, "model.beside": {name: {"class_path": PRUNE}}})
    pooled.refused(rf"model\.beside: another model of the report is named {name}", "evaluate")
    pooled.refused(rf"model\.beside: another model of the report is named {name}", "fit")


def test_a_recipe_that_loses_to_plain_pruning_is_told_with_both_numbers(work: Workplace) -> None:
    merged = {
        "class_path": "lightning_smoe.compression.recipe.Merge",
        "init_args": {
            "groups": "lightning_smoe.functional.grouping.Clustered",
            "merger": "lightning_smoe.functional.merging.Average",
            "router": "lightning_smoe.functional.router.MeanRows",
            "refit": None,
        },
    }
    work.write({"model.recipe": merged, "model.keep": 4})
    told = work.done("evaluate").err
    models = read(work.out / "report.json")["models"]
    best = min(("prune-frequency", "prune-reap"), key=lambda name: models[name]["kl"]["mean"])
    ours, plain = (models[name]["kl"]["mean"] for name in ("compressed", best))
    assert ours > plain
    [line] = [line for line in told.splitlines() if best in line]
    assert f"{ours:.4f}" in line
    assert f"{plain:.4f}" in line
