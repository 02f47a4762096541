"""From statistics to a plan: how many experts, which layers, and the same plan every time."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_smoe.calibration.module import CalibrationModule, ExpertStatistics
from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.planner import experts_to_keep, make_plan, select_layers
from lightning_smoe.compression.recipe import Merge, Prune, Recipe
from lightning_smoe.errors import InputError
from lightning_smoe.functional.clustering import Agglomerative, GateMassWard, KMeans
from lightning_smoe.functional.distance import MeanOutput, Output, RouterLogit, TokenCosine
from lightning_smoe.functional.merging import UnionSVD
from lightning_smoe.functional.router import MeanRows
from lightning_smoe.functional.saliency import Frequency, GateMass, Reap, ReapSum
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from tests.calibration.batches import WindowData, predict, random_windows
from tests.families import build

MERGES = [
    Merge(MeanOutput(), Agglomerative()),
    Merge(MeanOutput("cosine"), Agglomerative("complete"), weights=None),
    Merge(Output(), KMeans(), weights=GateMass(), merger=UnionSVD(), router=MeanRows()),
    Merge(TokenCosine(), KMeans(), weights=Reap()),
    Merge(Output(), GateMassWard()),
    Merge(RouterLogit(), GateMassWard()),
]
FAMILIES = ["mixtral", "deepseek_v3"]
Found = tuple[list[MoELayer], Statistics]


def calibrated(family: str, all_experts: bool = True) -> Found:
    model = build(family)
    windows = random_windows()
    manifest = Manifest("calibrate", {"checkpoint": f"fingerprint of {family}"})
    watch = ExpertStatistics(windows.domain_names, manifest, all_experts)
    predict(CalibrationModule(model), WindowData(windows), watch)
    return find_moe_layers(model), watch.statistics


@pytest.fixture(scope="module", params=FAMILIES)
def found(request: pytest.FixtureRequest) -> Found:
    """Layers and statistics of two families; the second chooses among two blocks of experts."""
    return calibrated(request.param)


def plan_of(found: Found, recipe: Recipe, count: int = 8) -> CompressionPlan:
    layers, statistics = found
    return make_plan(statistics, layers, recipe, {layer.name: count for layer in layers})


def layer_of(family: str, top_k: int | None = None) -> MoELayer:
    layer = find_moe_layers(build(family))[0]
    if top_k is not None:
        layer.router.top_k = top_k
    return layer


@pytest.mark.parametrize(
    ("keep", "count"),
    [(0.5, 6), (0.25, 3), (0.999, 12), (2 / 12, 2), (1.0, 12), (12, 12), (7, 7), (7.0, 7), (2, 2)],
)
def test_a_fraction_or_a_count_is_so_many_experts(keep: int | float, count: int) -> None:
    assert experts_to_keep(keep, layer_of("mixtral")) == count


@pytest.mark.parametrize("keep", [math.nan, math.inf, -math.inf, 0, 0.0, -1, -0.5])
def test_a_budget_that_is_no_number_above_zero_is_refused(keep: float) -> None:
    with pytest.raises(InputError, match=f"model.keep is {keep}; give a fraction in .0, 1. or a"):
        experts_to_keep(keep, layer_of("mixtral"))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (13, r"asks for 13 experts but model\.layers\.0\.mlp has 12"),
        (61, r"asks for 61 experts but model\.layers\.0\.mlp has 12"),
        (7.5, "is 7.5; a number of experts must be whole"),
        (1.5, "is 1.5; a number of experts must be whole"),
        (1, "keeps 1 experts .* needs 2; raise model.keep to 2 or more"),
        (0.1, "keeps 1 experts .* needs 2; raise model.keep to 2 or more"),
        (0.01, "keeps 0 experts .* needs 2; raise model.keep to 2 or more"),
    ],
)
def test_a_budget_that_the_layer_cannot_have_is_refused(keep: int | float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        experts_to_keep(keep, layer_of("mixtral"))


def test_sixty_one_of_sixty_experts_are_refused() -> None:
    layer = layer_of("mixtral")
    layer.select(torch.arange(60) % 12)
    assert experts_to_keep(60, layer) == 60
    assert experts_to_keep(0.5, layer) == 30
    with pytest.raises(InputError, match=r"asks for 61 experts but .* has 60"):
        experts_to_keep(61, layer)


def test_a_router_with_blocks_keeps_equally_many_in_each() -> None:
    layer = layer_of("deepseek_v3")
    assert [experts_to_keep(keep, layer) for keep in (8, 10, 12, 1.0)] == [8, 10, 12, 12]
    with pytest.raises(InputError, match="keep a multiple of 2, such as 8"):
        experts_to_keep(9, layer)
    with pytest.raises(InputError, match=r"top_k=4, 2 groups.* needs 8; raise model.keep to 8"):
        experts_to_keep(6, layer)


@pytest.mark.parametrize("top_k", range(1, 7))
def test_the_number_that_an_error_suggests_is_accepted(top_k: int) -> None:
    layer = layer_of("deepseek_v3", top_k)
    for keep in range(1, 13):
        try:
            experts_to_keep(keep, layer)
        except InputError as error:
            suggested = int(str(error).removesuffix(" or more").split()[-1])
            assert experts_to_keep(suggested, layer) == suggested


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


@pytest.mark.parametrize("recipe", [Prune(), *MERGES], ids=lambda recipe: str(recipe)[:70])
def test_every_plan_fits_its_model(found: Found, recipe: Recipe) -> None:
    plan = plan_of(found, recipe)
    layers, statistics = found
    plan.check(layers, str(statistics.manifest.inputs["checkpoint"]))
    assert [len(layer.groups) for layer in plan.layers] == [8] * len(layers)
    assert (plan.router, plan.merger, plan.align, plan.refit) == recipe.execution


@pytest.mark.parametrize("saliency", [Frequency(), GateMass(), Reap(), ReapSum()], ids=str)
@pytest.mark.parametrize("count", [4, 7, 11])
def test_pruning_keeps_the_highest_by_a_sort(saliency: Any, count: int) -> None:
    layers, statistics = calibrated("mixtral", all_experts=False)
    for plan in plan_of((layers, statistics), Prune(saliency), count).layers:
        scores = saliency(statistics.layers[plan.name].pooled()).tolist()
        ranking = sorted(range(12), key=lambda expert: (-scores[expert], expert))
        assert plan.groups == tuple((expert,) for expert in sorted(ranking[:count]))
        assert plan.dropped == tuple(sorted(ranking[count:]))


def test_keeping_everything_is_the_identity(found: Found) -> None:
    for recipe in (Prune(), Merge()):
        plan = plan_of(found, recipe, 12)
        assert all(layer.is_identity for layer in plan.layers)


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


@pytest.mark.parametrize("recipe", [Prune(), *MERGES], ids=lambda recipe: str(recipe)[:70])
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


def test_recipes_that_compare_all_experts_refuse_statistics_without_them() -> None:
    routed = calibrated("mixtral", all_experts=False)
    for recipe in (recipe for recipe in MERGES if recipe.needs_all_experts):
        with pytest.raises(InputError, match="calibrate again with this recipe"):
            plan_of(routed, recipe)
    assert len(plan_of(routed, Merge(RouterLogit(), GateMassWard())).layers) == 2


def test_statistics_of_another_model_are_refused() -> None:
    _, statistics = calibrated("mixtral")
    layers = find_moe_layers(build("qwen2_moe"))
    with pytest.raises(InputError, match=r"no layer model\.layers\.2\.mlp; calibrate this model"):
        plan_of((layers, statistics), Prune())
