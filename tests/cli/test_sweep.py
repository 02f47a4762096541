"""Many recipes at once: the same results as one by one, continued where cut off, told apart."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_smoe import sweep as sweep_module
from lightning_smoe.compression.recipe import Merge
from lightning_smoe.measure import measure, reseeded
from tests.cli.command import Workplace

RECIPE = "lightning_smoe.compression.recipe"
MINE = {"class_path": f"{RECIPE}.Prune"}
PLAIN = {
    "class_path": f"{RECIPE}.Prune",
    "init_args": {"saliency": "lightning_smoe.functional.saliency.GateMass", "refit": None},
}
MAPPED = {
    "class_path": f"{RECIPE}.Merge",
    "init_args": {"router": "lightning_smoe.functional.router_rows.Map", "refit": None},
}
BASELINES = ["prune-frequency", "prune-reap"]


def shelve(work: Workplace, **recipes: Any) -> None:
    """Puts recipes beside the experiment file."""
    (work.folder / "recipe").mkdir(exist_ok=True)
    for name, spec in recipes.items():
        (work.folder / "recipe" / f"{name}.yaml").write_text(yaml.safe_dump(spec))


def stored(work: Workplace) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((work.out / "sweep.json").read_text())
    return content


def keys(work: Workplace) -> list[tuple[str, float, int]]:
    return [(run["recipe"], run["keep"], run["seed"]) for run in stored(work)["runs"]]


def test_a_sweep_gives_what_plan_compress_and_evaluate_give(finished: Workplace) -> None:
    shelve(finished, compressed=MINE)
    words = ("--recipes", "compressed", "--keep", "6", "--split", "test")
    told = finished.done("sweep", *words)
    assert "calibrate: out/statistics.safetensors is there already" in told.err
    report = json.loads((finished.out / "report.json").read_text())
    content = stored(finished)
    for part in ("perplexity", "kl", "num_bytes", "num_parameters", "experts_per_layer"):
        assert content["teacher"][part] == report["teacher"][part]
    assert keys(finished) == [(name, 6, 42) for name in ("compressed", *BASELINES)]
    for run in content["runs"]:
        model = report["models"][run["recipe"]]
        assert run["kl"] == model["kl"]
        assert run["perplexity"] == model["perplexity"]
        assert run["top1_agreement"] == model["top1_agreement"]
        assert run["experts_per_layer"] == [6, 6]
        assert run["num_parameters"] == model["num_parameters"]
        assert run["seconds"].keys() == {"plan", "compress"}
    page = (finished.out / "sweep.md").read_text()
    assert "| compressed | 6 | 6 |" in page
    assert (finished.out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    for name in ("compressed", *BASELINES):
        assert f" {name} " in told.out
    assert "sweep: run 3 of 3: prune-reap, keep 6, seed 42" in told.err


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_stopped(
    work: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelve(work, plain=PLAIN)
    runs: list[Any] = []

    def killed(*args: Any) -> Any:
        if runs:
            raise KeyboardInterrupt
        runs.append(args)
        return measure(*args)

    words = ("--recipes", "plain", "--keep", "6")
    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "measure", killed)
        outcome = work.do("sweep", *words)
    assert outcome.code == 130
    assert keys(work) == [("plain", 6, 42)]
    first = stored(work)["runs"][0]
    told = work.done("sweep", *words).err
    assert "sweep: 1 of 3 runs are in out/sweep.json already" in told
    assert stored(work)["runs"][0] == first
    assert keys(work) == [(name, 6, 42) for name in ("plain", *BASELINES)]
    before = (work.out / "sweep.json").read_bytes()
    again = work.done("sweep", *words)
    assert "run 1 of" not in again.err
    assert (work.out / "sweep.json").read_bytes() == before
    assert " prune-reap " in again.out
    shelve(work, plain=MINE)
    match = r"plain, keep 6, seed 42: .* holds the result .* \(different: recipe\)"
    work.refused(match, "sweep", *words)
    work.refused(r"\(different: held-out text\)", "sweep", *words, "--data.valid_tokens=256")


def test_a_recipe_that_fails_is_named_and_the_others_go_on(work: Workplace) -> None:
    shelve(work, plain=PLAIN, mapped=MAPPED)
    shutil.rmtree(work.folder / "text" / "test")  # which choosing a recipe must not need
    told = work.done("sweep", "--recipes", "plain", "mapped", "--keep", "1")
    entries = {run["recipe"]: run for run in stored(work)["runs"]}
    assert entries["mapped"]["experts_per_layer"] == [1, 1]
    for name in ("plain", *BASELINES):
        assert "top_k" in entries[name]["error"]
        assert "kl" not in entries[name]
        assert f"sweep: failed: {name}, keep 1, seed 42: model.keep=1 keeps 1 experts" in told.err
    assert "## Failed" in (work.out / "sweep.md").read_text()


@pytest.mark.slow
def test_a_recipe_that_fails_halfway_is_tried_again_next_time(
    work: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelve(work, plain=PLAIN)

    def fails(trainer: Any, run: Any, *rest: Any) -> Any:
        if run.experiment.recipe.saliency.__class__.__name__ == "GateMass":
            raise ValueError("no such luck")
        return measure(trainer, run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "measure", fails)
        told = work.done("sweep", "--recipes", "recipe/plain.yaml", "--keep", "6").err
    assert "sweep: failed: plain, keep 6, seed 42: no such luck" in told
    told = work.done("sweep", "--recipes", "plain", "--keep", "6").err
    assert "sweep: run 1 of 1: plain, keep 6, seed 42" in told
    assert "failed" not in told
    assert all("error" not in run for run in stored(work)["runs"])


@pytest.mark.slow
def test_seeds_choose_the_calibration_text_and_leave_the_held_out_text(work: Workplace) -> None:
    shelve(work, plain=PLAIN)
    words = ("--recipes", "plain", "--keep", "0.5", "--seeds", "42", "1")
    told = work.done("sweep", *words, "--data.valid_tokens=256")
    assert keys(work) == [(n, 0.5, s) for s in (42, 1) for n in ("plain", *BASELINES)]
    assert (work.out / "statistics.safetensors").exists()
    assert (work.out / "seed-1" / "statistics.safetensors").exists()
    first, _, _, second, _, _ = stored(work)["runs"]
    assert first["kl"] != second["kl"]
    statistics = [r["manifest"]["inputs"]["statistics"] for r in (first, second)]
    assert statistics[0] != statistics[1]
    assert told.err.count("valid: 256 tokens") == 1
    assert "±" in told.out


def test_seeds_reach_every_part_of_a_recipe() -> None:
    from lightning_smoe.functional.grouping import Clustered
    from lightning_smoe.functional.kmeans import KMeans

    recipe = Merge(groups=Clustered(clusterer=KMeans(seed=3)), protect=False)
    assert reseeded(recipe, 7) == Merge(groups=Clustered(clusterer=KMeans(seed=7)), protect=False)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["plian"], r"--recipes plian: there is no plian\.yaml in .*did you mean plain\?"),
        (["none.yaml"], r"--recipes none\.yaml: there is no such file"),
        (["wrong"], r"recipe/wrong\.yaml is not a recipe: "),
        (["experiment.yaml"], r"experiment\.yaml is not a recipe: "),
        (["plain", "recipe/plain.yaml"], r"two are named plain"),
        (["prune-reap"], r"--recipes prune-reap is in every sweep"),
        (["plain", "--keep", "13"], r"--keep asks for 13 experts but model\.layers\.0"),
        (["plain", "--keep", "6", "1"], r"--keep=1 keeps 1 experts .* raise --keep"),
        (["plain", "--keep", "-0.5"], r"--keep is -0\.5"),
        (["plain", "--keep", "6", "6"], r"--keep \[6, 6\]: name at least one, and none twice"),
        (["plain", "--seeds", "[]"], r"--seeds \[\]: name at least one"),
        (["plain", "--keep", "half"], r"keep"),
        (["plain", "--split", "train"], r"split"),
        (["plain", "--trainer.devices=2"], r"sweep works in one process"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_any_work(
    words: list[str], match: str, work: Workplace
) -> None:
    shelve(work, plain=PLAIN, wrong={"class_path": f"{RECIPE}.Execution"})
    shelve(work, **{"prune-reap": PLAIN})
    keep = [] if "--keep" in words else ["--keep", "6"]
    work.refused(match, "sweep", "--recipes", *words, *keep)


def test_a_recipe_is_named_by_path_in_the_file_and_on_the_command_line(work: Workplace) -> None:
    shelve(work, plain=PLAIN)
    work.write({"model.recipe": "recipe/plain.yaml"})
    elsewhere = Workplace(work.folder.parent)
    told = elsewhere.run("plan", "--config", "work/experiment.yaml", "--print_config")
    printed = yaml.safe_load(told.out)["model"]["recipe"]
    assert printed["init_args"]["saliency"]["class_path"].endswith("GateMass")
    work.done("plan")
    saved = yaml.safe_load((work.out / "config.yaml").read_text())["model"]["recipe"]
    assert saved == printed
    work.write({})
    told = work.done("plan", "--model.recipe", "recipe/plain.yaml")
    assert "plan.json is there already" in told.err


def test_names_are_found_beside_the_experiment_file_from_another_folder(work: Workplace) -> None:
    from lightning_smoe.recipe_files import find_recipe

    shelve(work, plain=PLAIN)
    config = work.folder / "experiment.yaml"
    assert find_recipe("plain", [config]) == work.folder / "recipe" / "plain.yaml"
    shipped = Path(__file__).parents[2] / "configs" / "recipe"
    assert find_recipe("reap", [config]).resolve() == shipped / "reap.yaml"
