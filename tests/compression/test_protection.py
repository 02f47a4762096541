"""Super experts: found over the whole model, left as they are, and named in the plan."""

import logging

import pytest
import torch

from lightning_smoe.compression.layer_plan import LayerPlan
from lightning_smoe.compression.planner import make_plan
from lightning_smoe.compression.recipe import Merge, Prune, Recipe
from lightning_smoe.functional.grouping import Clustered
from lightning_smoe.functional.router import LogSumExp
from lightning_smoe.functional.saliency import Frequency
from lightning_smoe.models.layer import find_moe_layers
from tests.calibration.batches import gather, random_windows
from tests.compression.plans import copy_expert
from tests.families import build

SUPER = 4
RECIPES = [
    Prune(Frequency()),
    Merge(Clustered(), router=LogSumExp()),
    Merge(),
]


def plans(
    family: str, recipe: Recipe, count: int = 8, giants: tuple[int, ...] = (SUPER,)
) -> tuple[LayerPlan, ...]:
    """Plans for a model whose first layer has experts of huge outputs; expert 1 is alike."""
    model = build(family)
    layers = find_moe_layers(model)
    copy_expert(layers[0], SUPER, 1)
    with torch.no_grad():
        for giant in giants:
            layers[0].weights().down_proj[giant].mul_(100)
    statistics = gather(model, random_windows())
    return make_plan(statistics, layers, recipe, {each.name: count for each in layers}).layers


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: str(recipe)[:60])
def test_a_super_expert_has_a_slot_of_its_own_and_is_named(family: str, recipe: Recipe) -> None:
    first, second = plans(family, recipe)
    assert (SUPER,) in first.groups
    assert first.super_experts == (SUPER,)
    assert second.super_experts == ()


@pytest.mark.parametrize(
    "recipe",
    [
        Prune(Frequency(), protect=False),
        Merge(protect=False),
    ],
    ids=["prune", "merge"],
)
def test_without_protection_none_is_named(recipe: Recipe) -> None:
    for plan in plans("qwen3_moe", recipe, 4):
        assert plan.super_experts == ()


def test_pruning_would_drop_it_without_protection() -> None:
    recipe = Prune(Frequency(), protect=False)
    rarest = plans("qwen3_moe", recipe, 4)[0].dropped[0]
    assert rarest in plans("qwen3_moe", recipe, 4, (rarest,))[0].dropped
    assert (rarest,) in plans("qwen3_moe", Prune(Frequency()), 4, (rarest,))[0].groups


def test_only_experts_that_stay_alone_are_named() -> None:
    first, _ = plans("qwen3_moe", Merge(), 1)
    assert first.groups == (tuple(range(12)),)
    assert first.super_experts == ()


def test_the_identity_names_none() -> None:
    assert [plan.super_experts for plan in plans("mixtral", Merge(), 12)] == [(), ()]


def test_each_layer_is_planned_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning_smoe"):
        plans("qwen2_moe", Prune())
    lines = [record.getMessage() for record in caplog.records if "plan:" in record.getMessage()]
    assert [line.split(" in ")[0] for line in lines] == [
        "plan: model.layers.0.mlp, 12 -> 8 experts",
        "plan: model.layers.2.mlp, 12 -> 8 experts",
    ]
