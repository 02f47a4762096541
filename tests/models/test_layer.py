"""Laws of the one view on every mixture-of-experts block, on real models of every family."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.merging import Average
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from tests.families import NUM_EXPERTS
from tests.models.pruning import last_experts, prune, unchanged_rows
from tests.weights import parts

# Decoder layers that have experts; the others of qwen2, deepseek and ernie are dense.
MOE_LAYERS = {
    "qwen2_moe": [0, 2],
    "deepseek_v3": [1, 2],
    "gpt_oss": [0, 1],
    "granitemoe": [0, 1],
    "ernie4_5_moe": [1, 2],
}
# Sums over experts and softmax run in another order; logits are of order one.
ROUNDING = 1e-5
# An expert with this logit or choice score is never among the best.
NEVER = -1000.0


def test_it_finds_every_layer_with_experts_and_no_dense_one(
    family: str, tiny_moe: PreTrainedModel
) -> None:
    layers = find_moe_layers(tiny_moe)
    assert [layer.index for layer in layers] == MOE_LAYERS[family]
    assert all(tiny_moe.get_submodule(layer.name) is layer.block for layer in layers)


def test_its_sizes_are_those_of_the_configuration(family: str, tiny_moe: PreTrainedModel) -> None:
    layer = find_moe_layers(tiny_moe)[0]
    assert layer.num_experts == NUM_EXPERTS
    assert layer.top_k == 4
    assert (layer.hidden_size, layer.intermediate_size) == (32, 24)
    assert layer.num_router_groups == (2 if family == "deepseek_v3" else 1)


def test_a_router_group_keeps_the_experts_that_its_tokens_select(
    family: str, tiny_moe: PreTrainedModel
) -> None:
    # The router of deepseek_v3 selects top_k=4 experts within one group of the two.
    layer = find_moe_layers(tiny_moe)[0]
    assert layer.min_experts_per_router_group == (4 if family == "deepseek_v3" else 1)


def test_selecting_all_experts_keeps_every_logit_bit_for_bit(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    before = tiny_moe(tokens).logits
    for layer in find_moe_layers(tiny_moe):
        layer.select(torch.arange(NUM_EXPERTS))
    torch.testing.assert_close(tiny_moe(tokens).logits, before, rtol=0, atol=0)


def test_permuting_experts_with_their_router_rows_changes_logits_by_rounding_only(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    before = tiny_moe(tokens).logits
    generator = torch.Generator().manual_seed(1)
    for layer in find_moe_layers(tiny_moe):
        groups = torch.arange(NUM_EXPERTS).view(layer.num_router_groups, -1)
        order = torch.randperm(groups.shape[1], generator=generator)
        layer.select(groups[:, order].flatten())
    torch.testing.assert_close(tiny_moe(tokens).logits, before, rtol=0, atol=ROUNDING)


def test_permuting_experts_without_their_router_rows_changes_logits(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    before = tiny_moe(tokens).logits
    layer = find_moe_layers(tiny_moe)[0]
    layer.replace(layer.weights().map(lambda tensor: tensor.flip(0)), unchanged_rows)
    assert (tiny_moe(tokens).logits - before).abs().max() > 100 * ROUNDING


def router_inputs(model: PreTrainedModel, layer: MoELayer, tokens: Tensor) -> Tensor:
    inputs: list[Tensor] = []
    hook = layer.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(tokens)
    hook.remove()
    return inputs[0].reshape(-1, layer.hidden_size)


def shut_out(model: PreTrainedModel, tokens: Tensor, experts: list[int]) -> None:
    """Gives experts router rows that map every one of the tokens to the logit NEVER."""
    for layer in find_moe_layers(model):
        # Fewer tokens than the hidden size: the row that solves all equations exists.
        states = router_inputs(model, layer, tokens)
        row = torch.linalg.lstsq(states, torch.full((len(states), 1), NEVER)).solution[:, 0]
        values = {"weight": row, "bias": torch.zeros(()), "selection": torch.tensor(NEVER)}
        for tensor in layer.router_tensors:
            rows = tensor.rows.clone()
            rows[experts] = values[tensor.kind]
            tensor.set(rows)


@torch.no_grad()
def test_pruning_experts_that_no_token_is_routed_to_changes_logits_by_rounding_only(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    tokens, never = tokens[:1], [5, 11]
    shut_out(tiny_moe, tokens, never)
    chosen: list[Tensor] = []
    layers = find_moe_layers(tiny_moe)
    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
        for layer in layers
    ]
    before = tiny_moe(tokens).logits
    for hook in hooks:
        hook.remove()
    assert not torch.isin(torch.stack(chosen), torch.tensor(never)).any()
    for layer in layers:
        layer.select(torch.tensor([e for e in range(NUM_EXPERTS) if e not in never]))
    torch.testing.assert_close(tiny_moe(tokens).logits, before, rtol=0, atol=ROUNDING)


def test_after_select_the_model_runs_and_every_part_knows_the_new_number(
    family: str, tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    top_k = find_moe_layers(tiny_moe)[0].top_k
    prune(tiny_moe, 8)
    for layer in find_moe_layers(tiny_moe):
        assert (layer.num_experts, layer.top_k) == (8, top_k)
        for module in (layer.block, *layer.router.modules(), layer.experts):
            assert NUM_EXPERTS not in vars(module).values()
    assert tiny_moe(tokens).logits.isfinite().all()


def test_select_takes_the_named_experts_and_router_rows_in_that_order(
    tiny_moe: PreTrainedModel,
) -> None:
    for layer in find_moe_layers(tiny_moe):
        kept = torch.tensor([7, 0, 11, 4])
        weights = layer.weights().select(kept)
        rows = [tensor.rows[kept] for tensor in layer.router_tensors]
        layer.select(kept)
        for found, expected in zip(parts(layer.weights()), parts(weights), strict=True):
            assert torch.equal(found, expected)
        for tensor, expected in zip(layer.router_tensors, rows, strict=True):
            assert torch.equal(tensor.rows, expected)


def test_dropped_experts_leave_the_memory(tiny_moe: PreTrainedModel) -> None:
    layer = find_moe_layers(tiny_moe)[0]
    layer.select(torch.arange(4))
    held = [*layer.experts.parameters(), *(tensor.rows for tensor in layer.router_tensors)]
    for tensor in held:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@torch.no_grad()
def test_merging_an_expert_with_its_twin_changes_nothing(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    before = tiny_moe(tokens).logits
    for layer in find_moe_layers(tiny_moe):
        weights = layer.weights()
        twins = weights.select(torch.tensor([3, 3]))
        merged = Average()(twins, torch.tensor([0.25, 0.75]))
        rest = weights.select(torch.arange(4, NUM_EXPERTS))
        experts = [weights.select(torch.arange(3)), merged, rest]
        layer.replace(ExpertWeights.stack(experts), unchanged_rows)
    torch.testing.assert_close(tiny_moe(tokens).logits, before, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("num_experts", ["all", "top_k"])
def test_router_logits_are_rows_times_states(
    num_experts: str, tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    layer = find_moe_layers(tiny_moe)[0]
    if num_experts == "top_k":
        layer.select(last_experts(layer, layer.top_k))
    seen: list[tuple[Tensor, Any]] = []
    layer.router.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    tiny_moe(tokens)
    states, output = seen[0]
    rows = {tensor.kind: tensor.rows for tensor in layer.router_tensors}
    expected = states.reshape(-1, layer.hidden_size) @ rows["weight"].T + rows.get("bias", 0)
    torch.testing.assert_close(layer.router_logits(output), expected, rtol=1e-5, atol=1e-5)
