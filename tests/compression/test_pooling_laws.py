"""Whole models with pooled slots under a router that keeps all its rows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.compression.apply import apply_layer, apply_plan, finish
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.planner import make_plan
from lightning_smoe.compression.recipe import Merge, Prune, Recipe
from lightning_smoe.errors import InputError
from lightning_smoe.functional.alignment import ByActivations, ByWeights
from lightning_smoe.functional.evidence import TokenSample
from lightning_smoe.functional.grouping import Clustered
from lightning_smoe.functional.merging import Average
from lightning_smoe.functional.pooled_matching import PooledMatching
from lightning_smoe.functional.pooling import NeuronPool
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import LogSumExp
from lightning_smoe.functional.router_rows import Map
from lightning_smoe.functional.saliency import Frequency
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.mapped import is_mapped
from lightning_smoe.models.saving import save
from tests.calibration.batches import gather, random_windows
from tests.compression.plans import compressed, copy_expert, plan_for
from tests.families import build
from tests.weights import parts

POOLED = Merge(
    PooledMatching(), merger=NeuronPool(), alignment=None, router=Map(), refit=Refit(3.0)
)
RECIPES = {
    "pruned": Prune(),
    "merged": Merge(Clustered(), Frequency(), Average(), ByWeights(), LogSumExp()),
    "aligned": Merge(Clustered(), Frequency(), Average(), ByActivations(), LogSumExp()),
    "pooled": POOLED,
    "pooled in rows": replace(POOLED, router=LogSumExp()),
}
FAMILIES = ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss"]
# Whatever the blocks of a router are.
GROUPS = [[0], [1, 4, 9], [2], [3], [5], [6], [7], [8], [10], [11]]


def planned(
    model: PreTrainedModel, recipe: Recipe, count: int
) -> tuple[CompressionPlan, dict[str, TokenSample]]:
    """A plan for a model, and the sample of tokens that it is carried out with."""
    layers, statistics = find_moe_layers(model), gather(model, random_windows())
    plan = make_plan(statistics, layers, recipe, {layer.name: count for layer in layers})
    return plan, statistics.samples


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_pooled_refitted_saved_and_loaded(
    family: str, saved_checkpoint: Callable[[str], Path], tmp_path: Path, tokens: Tensor
) -> None:
    source = saved_checkpoint(family)
    model = load(source)
    plan, samples = planned(model, POOLED, 5)
    plan.check(find_moe_layers(model), plan.model)
    routers = [[t.rows.clone() for t in x.router_tensors] for x in find_moe_layers(model)]
    compressed(model, plan, samples=samples)
    assert is_mapped(model)
    for layer, router, changed in zip(find_moe_layers(model), routers, plan.layers, strict=True):
        assert (layer.num_experts, layer.num_router_rows) == (5, 12)
        assert layer.expert_map is not None
        assert layer.expert_map.tolist() == changed.grouping.assignment.tolist()
        kept = [tensor.rows for tensor in layer.router_tensors]
        assert all(torch.equal(a, b) for a, b in zip(kept, router, strict=True))
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.isfinite().all()
    made = Manifest("compress", {})
    save(model, open_checkpoint(source), tmp_path / "small", manifest=made, card="Tiny.")
    with torch.no_grad():
        after = load(tmp_path / "small")(tokens).logits
    torch.testing.assert_close(after, logits, rtol=0, atol=0)


@torch.no_grad()
def test_pooling_copies_of_an_expert_keeps_the_logits(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    layers = find_moe_layers(tiny_moe)
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        rows = [tensor.rows.clone() for tensor in layer.router_tensors]
        for copy in (4, 9):
            order = torch.randperm(layer.intermediate_size, generator=generator)
            copy_expert(layer, 1, copy, order)
        # Their own rows again: they are not always selected together.
        for tensor, old in zip(layer.router_tensors, rows, strict=True):
            tensor.set(old)
    before = tiny_moe(tokens).logits
    samples = gather(tiny_moe, random_windows()).samples
    plan = plan_for(layers, GROUPS, router=Map(), merger=NeuronPool())
    apply_plan(tiny_moe, plan, samples)
    assert is_mapped(tiny_moe)
    torch.testing.assert_close(tiny_moe(tokens).logits, before, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_map_of_experts_that_are_not_merged_keeps_every_logit_exactly(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    before = tiny_moe(tokens).logits
    layers = find_moe_layers(tiny_moe)
    plan = replace(CompressionPlan.identity(layers), router=Map())
    for layer, same in zip(layers, plan.layers, strict=True):
        apply_layer(layer, same, plan)
    finish(tiny_moe)
    assert is_mapped(tiny_moe)
    torch.testing.assert_close(tiny_moe(tokens).logits, before, rtol=0, atol=0)


@torch.no_grad()
def test_slots_of_one_expert_keep_every_bit(tiny_moe: PreTrainedModel) -> None:
    layers = find_moe_layers(tiny_moe)
    before = [layer.weights().map(torch.clone) for layer in layers]
    samples = gather(tiny_moe, random_windows()).samples
    apply_plan(tiny_moe, plan_for(layers, GROUPS, router=Map(), merger=NeuronPool()), samples)
    single = [(slot, group[0]) for slot, group in enumerate(GROUPS) if len(group) == 1]
    slots, experts = (torch.tensor(column) for column in zip(*single, strict=True))
    for layer, original in zip(find_moe_layers(tiny_moe), before, strict=True):
        for after, expected in zip(parts(layer.weights()), parts(original), strict=True):
            assert torch.equal(after[slots], expected[experts])


def with_idle_experts(family: str) -> PreTrainedModel:
    """A model four of whose experts in each layer no token visits."""
    model = build(family)
    with torch.no_grad():
        for layer in find_moe_layers(model):
            for tensor in layer.router_tensors:
                if tensor.kind != "weight":
                    tensor.rows[[1, 3, 5, 8]] = -100.0
    return model


def assert_finite(model: PreTrainedModel, tokens: Tensor) -> None:
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    with torch.no_grad():
        assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_that_no_token_visits_give_no_nan(family: str, recipe: str, tokens: Tensor) -> None:
    model = with_idle_experts(family)
    plan, samples = planned(model, RECIPES[recipe], 8)
    for layer in plan.layers:
        assert layer.weights is None or layer.weights.isfinite().all()
    assert_finite(compressed(model, plan, samples=samples), tokens)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "pruned"])
def test_a_slot_that_no_token_visits_gives_no_nan(recipe: str, tokens: Tensor) -> None:
    model = with_idle_experts("gpt_oss")
    plan, samples = planned(model, RECIPES[recipe], 8)
    groups = [[1, 3], *([expert] for expert in range(12) if expert not in (1, 3))]
    layers = tuple(replace(layer, groups=tuple(map(tuple, groups))) for layer in plan.layers)
    assert_finite(compressed(model, replace(plan, layers=layers), samples=samples), tokens)


def test_a_merger_that_looks_at_tokens_says_that_it_has_none() -> None:
    model = build("mixtral")
    plan = plan_for(find_moe_layers(model), GROUPS, router=Map(), merger=NeuronPool())
    with pytest.raises(InputError, match="looks at a sample of tokens, and there is none; cali"):
        apply_plan(model, plan)


def test_the_sample_is_not_looked_at_by_other_mergers() -> None:
    found = []
    for given in (False, True):
        model = build("mixtral")
        layers = find_moe_layers(model)
        samples = gather(model, random_windows()).samples if given else None
        apply_plan(model, plan_for(layers, GROUPS, router=Map()), samples)
        found.append(model.state_dict())
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())
