"""Every recipe of configs/recipe/ on families of every kind, in memory, and what ours save."""

import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.planner import make_plan
from lightning_smoe.functional.divergence import kl_divergence
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.saving import save
from lightning_smoe.recipe_files import read_recipe
from tests.calibration.batches import gather, random_windows
from tests.cli.command import QUIET
from tests.compression.plans import compressed
from tests.models.pruning import CARD, MANIFEST

FILES = sorted((Path(__file__).parents[2] / "configs" / "recipe").glob("*.yaml"))
with mock.patch.dict(os.environ, QUIET):
    RECIPES = {path.stem: read_recipe(path) for path in FILES}
# A gated shared expert, blocks of experts beside a plain one, and biases.
FAMILIES = ("qwen2_moe", "deepseek_v3", "gpt_oss")
KEPT = 8
WINDOWS = random_windows()

Original = tuple[PreTrainedModel, Statistics]


FAST = "deepseek_v3"
MARKED = [pytest.param(f, marks=() if f == FAST else pytest.mark.slow) for f in FAMILIES]


@pytest.fixture(scope="module", params=MARKED)
def original(request: pytest.FixtureRequest, built_checkpoint: Callable[[str], Path]) -> Original:
    """A model of every family in turn and its statistics, not to be changed by tests."""
    model = load(built_checkpoint(request.param))
    return model, gather(deepcopy(model), WINDOWS)


def shrunk(name: str, original: Original) -> tuple[PreTrainedModel, CompressionPlan]:
    """A copy of a model of twelve experts, of which a recipe keeps eight, and the plan."""
    model, statistics = deepcopy(original[0]), original[1]
    layers = find_moe_layers(model)
    plan = make_plan(statistics, layers, RECIPES[name], {x.name: KEPT for x in layers})
    plan.check(layers, plan.model)
    return compressed(model, plan, WINDOWS, statistics.samples), plan


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(
        WINDOWS.input_ids, attention_mask=WINDOWS.attention_mask, use_cache=False
    ).logits[WINDOWS.attention_mask.bool()]
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_compresses_every_family(name: str, original: Original) -> None:
    model, plan = shrunk(name, original)
    assert [layer.num_experts for layer in find_moe_layers(model)] == [KEPT] * len(plan.layers)
    assert plan.router == RECIPES[name].execution.router
    assert plan.refit == RECIPES[name].execution.refit
    divergence = kl_divergence(logits(original[0]), logits(model)).mean()
    assert 0 < divergence < 1


@pytest.mark.parametrize("name", ["default", "stock"])
def test_what_our_recipes_give_is_saved_and_loaded_by_stock_transformers(
    name: str, original: Original, tmp_path: Path
) -> None:
    model, _ = shrunk(name, original)
    source = open_checkpoint(original[0].config._name_or_path)
    save(model, source, tmp_path / "out", manifest=MANIFEST, card=CARD)
    assert open_checkpoint(tmp_path / "out").is_mapped == (name == "default")
    for again in (load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_of_a_recipe_says_what_it_is(name: str) -> None:
    header = [line for line in FILES[list(RECIPES).index(name)].read_text().splitlines() if line]
    comments = [line for line in header if line.startswith("#")]
    assert header[: len(comments)] == comments
    assert comments
