"""Methods, as an experiment file names them."""

import json
from typing import Any

import pytest

from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.layer import find_moe_layers
from tests.cli.command import Workplace, snapshot

FUNCTIONAL = "lightning_smoe.functional"
COMPRESSION = "lightning_smoe.compression.recipe"


def spec(path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": init_args}


def merge(**init_args: Any) -> dict[str, Any]:
    return spec(f"{COMPRESSION}.Merge", **init_args)


def prune(**init_args: Any) -> dict[str, Any]:
    return spec(f"{COMPRESSION}.Prune", **init_args)


def clustered(path: str, **init_args: Any) -> dict[str, Any]:
    """Groups of experts by clustering the default distance."""
    return spec(f"{FUNCTIONAL}.grouping.Clustered", clusterer=spec(path, **init_args))


RECIPES = {
    "frequency": prune(saliency=f"{FUNCTIONAL}.saliency.Frequency", refit=None),
    "reap": prune(saliency=f"{FUNCTIONAL}.saliency.Reap", refit={"strength": 1.0}),
    "k-means": merge(
        groups=clustered(f"{FUNCTIONAL}.kmeans.KMeans", num_starts=2, seed=1),
        merger=spec(f"{FUNCTIONAL}.merging.UnionSVD", rank=8),
        router=f"{FUNCTIONAL}.router.Slice",
    ),
    "ward": merge(
        groups=clustered(f"{FUNCTIONAL}.clustering.GateMassWard"),
        merger=f"{FUNCTIONAL}.merging.Average",
        alignment=f"{FUNCTIONAL}.alignment.ByBoth",
        weights=f"{FUNCTIONAL}.saliency.GateMass",
        router=spec(f"{FUNCTIONAL}.router.LogSumExp", strength=0.01),
        refit=None,
    ),
}


def plan_of(work: Workplace) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((work.out / "plan.json").read_text())
    return stored


SLOW = ("reap", "ward")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in RECIPES]
)
def test_every_recipe_of_an_experiment_file_gives_a_checkpoint(name: str, work: Workplace) -> None:
    recipe = RECIPES[name]
    work.write({"model.recipe": recipe})
    work.done("compress")
    counts = [layer.num_experts for layer in find_moe_layers(load(work.out / "compressed"))]
    assert counts == [6, 6]
    plan = plan_of(work)
    merges = recipe["class_path"].endswith("Merge")
    assert all(bool(layer["dropped"]) != merges for layer in plan["layers"])
    for key in ("router", "merger"):
        asked = recipe["init_args"].get(key)
        if asked is not None:
            asked = asked if isinstance(asked, dict) else spec(asked)
            assert plan[key]["class_path"] == asked["class_path"]
            assert asked["init_args"].items() <= plan[key]["init_args"].items()
    wants_refit = recipe["init_args"].get("refit", True) is not None
    assert (plan["refit"] is not None) == wants_refit


def test_saliencies_disagree_and_none_is_mistaken_for_another(work: Workplace) -> None:
    work.write({"model.recipe": RECIPES["frequency"]})
    work.done("plan")
    by_frequency = plan_of(work)["layers"]
    work.write({"model.recipe": RECIPES["reap"]})
    work.refused(r"plan\.json holds the result of another run \(different: recipe\)", "plan")
    work.done("plan", "--model.overwrite=true")
    assert plan_of(work)["layers"] != by_frequency


def test_some_layers_only_give_uneven_counts_that_every_verb_takes(work: Workplace) -> None:
    work.write({"model.layers": [2], "trainer.logger": True})
    told = work.done("fit")
    assert "from_pretrained('out/recovered', trust_remote_code=True)" in told.out
    assert " 6-12 " in told.out
    report = json.loads((work.out / "report.json").read_text())
    for name in ("compressed", "recovered", "prune-frequency", "prune-reap"):
        assert report["models"][name]["experts_per_layer"] == [12, 6]
    shown = work.run("inspect", "out/recovered").out
    assert "Layer 0: 12 experts" in shown
    assert "Layer 1: no experts" in shown
    assert "Layer 2: 6 experts" in shown
    written = work.run("generate", "out/recovered", "--prompt", "The sea", "--max_new_tokens=3")
    assert written.code == 0
    assert written.out.startswith("The sea")
    card = (work.out / "compressed/README.md").read_text()
    assert "The layers have different numbers of experts. The file `modeling_smoe.py`" in card


def test_the_fraction_and_the_number_that_mean_the_same_keep_the_same(work: Workplace) -> None:
    work.done("plan", "--model.keep=0.5")
    half = plan_of(work)["layers"]
    work.done("plan", "--model.keep=6", "--model.overwrite=true")
    assert plan_of(work)["layers"] == half


def test_keeping_all_experts_keeps_every_bit(work: Workplace) -> None:
    work.done("evaluate", "--model.keep=1.0", "--model.baselines=false")
    compressed = json.loads((work.out / "report.json").read_text())["models"]["compressed"]
    assert compressed["kl"]["mean"] == 0
    assert compressed["top1_agreement"] == 1


def test_the_same_seed_twice_gives_the_same_bytes(work: Workplace) -> None:
    work.write({"model.recipe": RECIPES["k-means"]})
    work.done("compress")
    first = snapshot(work.out.rename(work.folder / "first"))
    work.done("compress")
    second = snapshot(work.out)
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} <= {"seconds.json"}
