"""Merging without tokens, against loops and laws."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.compression.apply import apply_plan, router_rows
from lightning_smoe.functional.alignment import ByWeights
from lightning_smoe.functional.router import MeanRows, RouterRepair, Slice
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from tests.compression.plans import PAIRED, copy_expert, plan_for
from tests.families import build
from tests.weights import parts


def selection_of(layer: MoELayer) -> Tensor:
    """What is added to the scores where experts are chosen."""
    return next(tensor.rows for tensor in layer.router_tensors if tensor.kind == "selection")


@torch.no_grad()
@pytest.mark.parametrize("router", [Slice(), MeanRows()], ids=str)
def test_merging_equal_experts_gives_either(
    tiny_moe: PreTrainedModel, router: RouterRepair
) -> None:
    layers = find_moe_layers(tiny_moe)
    for layer in layers:
        copy_expert(layer, 1, 4)
        copy_expert(layer, 9, 7)
    before = [layer.weights().map(torch.clone) for layer in layers]
    rows = [router_rows(layer) for layer in layers]
    shares = torch.arange(12, dtype=torch.float64)
    apply_plan(tiny_moe, plan_for(layers, PAIRED, shares, router=router))
    first = torch.tensor([group[0] for group in PAIRED])
    for layer, original, row in zip(find_moe_layers(tiny_moe), before, rows, strict=True):
        for after, expected in zip(parts(layer.weights()), parts(original), strict=True):
            torch.testing.assert_close(after, expected[first], rtol=0, atol=1e-6)
        for tensor in layer.router_tensors:
            if tensor.kind == "weight":
                torch.testing.assert_close(tensor.rows, row.weight[first], rtol=0, atol=1e-6)
            elif tensor.kind == "bias" and row.bias is not None:
                torch.testing.assert_close(tensor.rows, row.bias[first], rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_merge_is_the_weighted_mean_of_a_loop(tiny_moe: PreTrainedModel) -> None:
    layers = find_moe_layers(tiny_moe)
    before = [layer.weights().map(torch.clone) for layer in layers]
    shares = 1 + torch.arange(12, dtype=torch.float64)
    apply_plan(tiny_moe, plan_for(layers, PAIRED, weights=shares))
    for layer, original in zip(find_moe_layers(tiny_moe), before, strict=True):
        for after, members in zip(parts(layer.weights()), parts(original), strict=True):
            for slot, group in enumerate(PAIRED):
                total = sum(float(shares[expert]) for expert in group)
                mean = sum(float(shares[expert]) * members[expert] for expert in group) / total
                torch.testing.assert_close(after[slot], mean, rtol=0, atol=1e-6)


@torch.no_grad()
def test_an_added_score_of_a_merged_slot_is_the_weighted_mean_of_its_members() -> None:
    model = build("deepseek_v3")
    layers = find_moe_layers(model)
    shares = 1 + torch.arange(12, dtype=torch.float64)
    before = selection_of(layers[0]).clone()
    apply_plan(model, plan_for(layers, PAIRED, weights=shares, router=MeanRows()))
    after = selection_of(find_moe_layers(model)[0])
    assert after.dtype == before.dtype
    for slot, group in enumerate(PAIRED):
        mean = sum(float(shares[e] * before[e]) for e in group) / float(shares[group].sum())
        assert float(after[slot]) == pytest.approx(mean, abs=1e-6)


@torch.no_grad()
def test_a_sliced_slot_has_the_added_score_of_its_heaviest_member() -> None:
    model = build("deepseek_v3")
    layers = find_moe_layers(model)
    shares = 1 + torch.arange(12, dtype=torch.float64)
    before = selection_of(layers[0]).clone()
    apply_plan(model, plan_for(layers, PAIRED, weights=shares, router=Slice()))
    after = selection_of(find_moe_layers(model)[0])
    assert after.tolist() == [float(before[max(group)]) for group in PAIRED]


@torch.no_grad()
def test_merging_a_copy_whose_neurons_are_permuted_gives_the_original(
    tiny_moe: PreTrainedModel,
) -> None:
    layers = find_moe_layers(tiny_moe)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for layer in layers:
        copy_expert(layer, 1, 4, order)
    before = [layer.weights().map(torch.clone) for layer in layers]
    shares = torch.ones(12, dtype=torch.float64)
    shares[1] = 2
    apply_plan(tiny_moe, plan_for(layers, PAIRED, weights=shares, alignment=ByWeights()))
    for layer, original in zip(find_moe_layers(tiny_moe), before, strict=True):
        for after, expected in zip(parts(layer.weights()), parts(original), strict=True):
            torch.testing.assert_close(after[1], expected[1], rtol=0, atol=1e-6)


@torch.no_grad()
def test_without_alignment_a_permuted_copy_is_blurred() -> None:
    model = build("mixtral")
    layers = find_moe_layers(model)
    copy_expert(layers[0], 1, 4, torch.arange(24).flip(0))
    original = layers[0].weights().up_proj[1].clone()
    apply_plan(model, plan_for(layers, PAIRED))
    merged = find_moe_layers(model)[0].weights().up_proj[1]
    assert (merged - original).norm() > 0.5 * original.norm()


@torch.no_grad()
def test_slots_that_are_not_merged_keep_every_bit(tiny_moe: PreTrainedModel) -> None:
    layers = find_moe_layers(tiny_moe)
    before = [layer.weights().map(torch.clone) for layer in layers]
    apply_plan(tiny_moe, plan_for(layers, PAIRED, router=MeanRows()))
    single = [(slot, group[0]) for slot, group in enumerate(PAIRED) if len(group) == 1]
    slots, experts = (torch.tensor(column) for column in zip(*single, strict=True))
    for layer, original in zip(find_moe_layers(tiny_moe), before, strict=True):
        for after, expected in zip(parts(layer.weights()), parts(original), strict=True):
            assert torch.equal(after[slots], expected[experts])


@torch.no_grad()
def test_bfloat16_stays_bfloat16_and_is_merged_in_float32() -> None:
    model = build("gpt_oss").bfloat16()
    layers = find_moe_layers(model)
    before = layers[0].weights().map(torch.clone)
    apply_plan(model, plan_for(layers, PAIRED, router=MeanRows()))
    layer = find_moe_layers(model)[0]
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    for after, members in zip(parts(layer.weights()), parts(before), strict=True):
        wide = members[[1, 4]].float().mean(0)
        assert torch.equal(after[1], wide.bfloat16())
