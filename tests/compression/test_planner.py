"""From statistics to a plan: which layers, which experts, and the same plan every time."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from lightning_smoe.calibration.module import CalibrationModule, ExpertStatistics
from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.planner import evidence_of, make_plan, select_layers
from lightning_smoe.compression.recipe import Execution, Merge, Prune, Recipe
from lightning_smoe.errors import InputError
from lightning_smoe.functional.alignment import ByWeights
from lightning_smoe.functional.clustering import Agglomerative
from lightning_smoe.functional.distance import MeanOutput, Output, RouterLogit, TokenCosine
from lightning_smoe.functional.grouping import Clustered
from lightning_smoe.functional.kmeans import KMeans
from lightning_smoe.functional.merging import Average, UnionSVD
from lightning_smoe.functional.router import LogSumExp, MeanRows
from lightning_smoe.functional.saliency import Frequency, GateMass, Reap, ReapSum
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from tests.calibration.batches import WindowData, predict, random_windows
from tests.families import build

MERGES = [
    Merge(Clustered(MeanOutput(), Agglomerative()), router=LogSumExp()),
    Merge(Clustered(MeanOutput("cosine"), Agglomerative("complete")), router=LogSumExp()),
    Merge(Clustered(Output(), KMeans()), GateMass(), UnionSVD(), router=MeanRows()),
    Merge(Clustered(TokenCosine(), KMeans()), weights=Reap(), router=LogSumExp()),
    Merge(Clustered(), Frequency(), Average(), ByWeights(), LogSumExp()),
    Merge(Clustered(RouterLogit()), router=LogSumExp()),
    Merge(router=LogSumExp()),
]
POOLED = Merge()
RECIPES = [Prune(), *MERGES, POOLED]
FAMILIES = ["mixtral", "deepseek_v3"]
Found = tuple[list[MoELayer], Statistics]


def calibrated(family: str, model: PreTrainedModel | None = None) -> Found:
    model = model or build(family)
    windows = random_windows()
    manifest = Manifest("calibrate", {"checkpoint": f"fingerprint of {family}"})
    watch = ExpertStatistics(windows.domain_names, manifest)
    predict(CalibrationModule(model), WindowData(windows), watch)
    return find_moe_layers(model), watch.statistics


@pytest.fixture(scope="module", params=FAMILIES)
def found(request: pytest.FixtureRequest) -> Found:
    """Layers and statistics of two families; the second chooses among two blocks of experts."""
    return calibrated(request.param)


def plan_of(found: Found, recipe: Recipe, count: int = 8) -> CompressionPlan:
    layers, statistics = found
    return make_plan(statistics, layers, recipe, {layer.name: count for layer in layers})


def test_all_layers_or_the_named_ones_change() -> None:
    layers = find_moe_layers(build("qwen2_moe"))
    assert select_layers(layers, "all") == layers
    assert [layer.index for layer in select_layers(layers, [2])] == [2]
    assert [layer.index for layer in select_layers(layers, [2, 0, 2])] == [0, 2]


@pytest.mark.parametrize("wanted", ["none", "", []])
def test_naming_no_layer_is_refused(wanted: Any) -> None:
    with pytest.raises(InputError, match="give 'all' or a list of layer indices"):
        select_layers(find_moe_layers(build("qwen2_moe")), wanted)


@pytest.mark.parametrize(("wanted", "unknown"), [([1], "[1]"), ([7, 0, -1], "[-1, 7]")])
def test_layers_without_experts_are_refused(wanted: list[int], unknown: str) -> None:
    message = rf"names \{unknown[:-1]}\], which have no experts; these have: \[0, 2\]"
    with pytest.raises(InputError, match=message):
        select_layers(find_moe_layers(build("qwen2_moe")), wanted)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: str(recipe)[:70])
def test_every_plan_fits_its_model(found: Found, recipe: Recipe) -> None:
    plan = plan_of(found, recipe)
    layers, statistics = found
    plan.check(layers, str(statistics.manifest.inputs["checkpoint"]))
    assert [len(layer.groups) for layer in plan.layers] == [8] * len(layers)
    carried_out = Execution(plan.router, plan.merger, plan.alignment, plan.refit)
    assert carried_out == recipe.execution


@pytest.mark.parametrize("saliency", [Frequency(), GateMass(), Reap(), ReapSum()], ids=str)
@pytest.mark.parametrize("count", [4, 7, 11])
def test_pruning_keeps_the_highest_by_a_sort(saliency: Any, count: int) -> None:
    layers, statistics = calibrated("mixtral")
    recipe = Prune(saliency, protect=False)
    for layer, plan in zip(
        layers, plan_of((layers, statistics), recipe, count).layers, strict=True
    ):
        scores = saliency(evidence_of(layer, statistics)).tolist()
        ranking = sorted(range(12), key=lambda expert: (-scores[expert], expert))
        assert plan.groups == tuple((expert,) for expert in sorted(ranking[:count]))
        assert plan.dropped == tuple(sorted(ranking[count:]))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: str(recipe)[:70])
def test_keeping_everything_is_the_identity(found: Found, recipe: Recipe) -> None:
    plan = plan_of(found, recipe, 12)
    assert all(layer.is_identity for layer in plan.layers)
    assert not plan.by_name()


@pytest.mark.parametrize("recipe", MERGES, ids=lambda recipe: str(recipe)[:70])
@pytest.mark.parametrize("count", [8, 10])
def test_merging_divides_all_experts_within_their_blocks(
    found: Found, recipe: Recipe, count: int
) -> None:
    layers, _ = found
    for layer, plan in zip(layers, plan_of(found, recipe, count).layers, strict=True):
        assert len(plan.groups) == count
        assert sorted(expert for group in plan.groups for expert in group) == list(range(12))
        size = 12 // layer.num_router_groups
        blocks = [{expert // size for expert in group} for group in plan.groups]
        each = count // layer.num_router_groups
        assert blocks == [{slot // each} for slot in range(count)]


@pytest.mark.parametrize("count", [1, 3, 5, 7, 11])
def test_a_router_that_keeps_all_rows_does_not_bind_the_groups_to_its_blocks(count: int) -> None:
    layers, statistics = calibrated("deepseek_v3")
    plan = plan_of((layers, statistics), POOLED, count)
    plan.check(layers, str(statistics.manifest.inputs["checkpoint"]))
    for layer in plan.layers:
        assert len(layer.groups) == count
        assert not layer.dropped
        assert sorted(expert for group in layer.groups for expert in group) == list(range(12))


def test_counts_may_differ_by_layer() -> None:
    layers, statistics = calibrated("mixtral")
    counts = {layers[0].name: 4, layers[1].name: 9}
    plan = make_plan(statistics, layers, Prune(), counts)
    assert [len(layer.groups) for layer in plan.layers] == [4, 9]


def test_a_plan_names_its_model_and_what_made_it() -> None:
    layers, statistics = calibrated("mixtral")
    manifest = Manifest("plan", {"keep": 6})
    counts = {layer.name: 6 for layer in layers}
    plan = make_plan(statistics, layers, Prune(), counts, manifest=manifest)
    assert plan.model == "fingerprint of mixtral"
    assert plan.manifest == manifest


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: str(recipe)[:70])
def test_the_same_statistics_give_the_same_bytes(
    found: Found, recipe: Recipe, tmp_path: Path
) -> None:
    layers, statistics = found
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = Statistics.load(tmp_path / "statistics.safetensors")
    for folder, source in (("first", statistics), ("second", statistics), ("third", loaded)):
        plan_of((layers, source), recipe).save(tmp_path / folder / "plan.json")
    for name in ("plan.json", "plan.safetensors"):
        written = {(tmp_path / f / name).read_bytes() for f in ("first", "second", "third")}
        assert len(written) == 1


def test_statistics_of_another_model_are_refused() -> None:
    _, statistics = calibrated("mixtral")
    layers = find_moe_layers(build("qwen2_moe"))
    with pytest.raises(InputError, match=r"no layer model\.layers\.2\.mlp; calibrate this model"):
        plan_of((layers, statistics), Prune())
