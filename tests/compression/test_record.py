"""A block's output put together again from the parts that a refit may change."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_smoe.compression.record import (
    BlockRecord,
    bias_output,
    check_understood,
    expert_features,
    output_features,
    output_weights,
    record,
    set_output_weights,
)
from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from tests.calibration.batches import num_hooks, random_windows
from tests.families import build

WITH_SHARED = ["qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe"]
# Relative to the output: sums over neurons are formed in another order than the model's.
ROUNDING = 1e-5


@torch.no_grad()
def recorded(model: PreTrainedModel, layer: MoELayer) -> tuple[BlockRecord, Any]:
    windows = random_windows(5)
    mask = windows.attention_mask
    return record(
        layer,
        mask.bool(),
        lambda: model.base_model(windows.input_ids, attention_mask=mask, use_cache=False),
    )


@torch.no_grad()
def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_output_matrices_times_features_are_the_output_of_the_block(
    tiny_moe: PreTrainedModel,
) -> None:
    for layer in find_moe_layers(tiny_moe):
        block, _ = recorded(tiny_moe, layer)
        features = output_features(layer, block).values
        rebuilt = features @ output_weights(layer).T + bias_output(layer, block)
        assert distance(rebuilt, block.output) < ROUNDING
        check_understood(layer, block, features)


def test_features_are_weighted_activations_of_a_loop(tiny_moe: PreTrainedModel) -> None:
    layer = find_moe_layers(tiny_moe)[0]
    block, _ = recorded(tiny_moe, layer)
    features = output_features(layer, block).values
    width = layer.intermediate_size
    routed = block.tokens
    for token in range(len(features)):
        expected = torch.zeros(layer.num_experts, width)
        chosen = routed.expert_indices[token].tolist()
        for place, expert in enumerate(chosen):
            state = routed.states[token : token + 1]
            activation = layer.activations(state, expert)[0]
            expected[expert] = activation * routed.routing_weights[token, place]
        found = features[token, : layer.num_experts * width]
        torch.testing.assert_close(found, expected.flatten(), rtol=1e-5, atol=1e-6)
    assert features.shape[1] - layer.num_experts * width == (
        0 if block.shared is None else block.shared.shape[1]
    )


def test_blocks_cover_all_features_that_are_not_zero(tiny_moe: PreTrainedModel) -> None:
    layer = find_moe_layers(tiny_moe)[0]
    block, _ = recorded(tiny_moe, layer)
    features = output_features(layer, block)
    outside = features.values.clone()
    for columns, rows in features.blocks:
        outside[rows, columns] = 0
    assert not outside.any()


@torch.no_grad()
def test_rows_that_share_an_expert_add_up_in_its_features(tiny_moe: PreTrainedModel) -> None:
    layer = find_moe_layers(tiny_moe)[0]
    half = torch.arange(12) // 2
    layer.share(layer.weights().select(torch.arange(0, 12, 2)), half)
    block, _ = recorded(tiny_moe, layer)
    tokens, width = block.tokens, layer.intermediate_size
    in_order = tokens.expert_indices.sort(1).values
    assert bool((in_order[:, 1:] == in_order[:, :-1]).any())
    features = output_features(layer, block).values
    check_understood(layer, block, features)
    for token in range(0, len(features), 3):
        for expert in range(6):
            gate = sum(
                float(tokens.routing_weights[token, place])
                for place, chosen in enumerate(tokens.expert_indices[token].tolist())
                if chosen == expert
            )
            activation = layer.activations(tokens.states[token : token + 1], expert)[0]
            found = features[token, expert * width : (expert + 1) * width]
            torch.testing.assert_close(found, gate * activation, rtol=1e-4, atol=1e-5)
    for expert in range(6):
        rows, values = expert_features(layer, block, expert)
        columns = slice(expert * width, (expert + 1) * width)
        assert torch.equal(features[rows, columns], values)
        assert int((features[:, columns] != 0).any(1).sum()) == len(values)


def test_padding_is_left_out_of_a_record() -> None:
    model = build("qwen2_moe")
    layer = find_moe_layers(model)[0]
    block, result = recorded(model, layer)
    num_tokens = random_windows(5).num_tokens
    assert block.shared is not None
    for tensor in (block.tokens.states, block.shared, block.output):
        assert len(tensor) == num_tokens
    assert result.last_hidden_state.shape[:2] == (5, 9)


def test_the_gate_of_a_shared_expert_scales_its_features() -> None:
    model = build("qwen2_moe")
    layer = find_moe_layers(model)[0]
    assert layer.shared_expert is not None
    gate = layer.shared_expert[1]
    assert isinstance(gate, nn.Linear)
    before = recorded(model, layer)[0].shared
    with torch.no_grad():
        gate.weight.zero_()
    after, tokens = recorded(model, layer)[0].shared, recorded(model, layer)[0].tokens
    assert before is not None
    assert after is not None
    # The sigmoid of zero: what the shared expert's output matrix reads, halved.
    shared = layer.block.get_submodule("shared_expert")
    gated = shared.get_submodule("gate_proj")(tokens.states)
    inner = nn.functional.silu(gated) * shared.get_submodule("up_proj")(tokens.states)
    torch.testing.assert_close(after, inner / 2, rtol=1e-4, atol=1e-6)
    assert distance(before, after) > 0.01


def test_recording_changes_no_bit_and_leaves_no_hook(tiny_moe: PreTrainedModel) -> None:
    layer = find_moe_layers(tiny_moe)[0]
    windows = random_windows(5)
    with torch.no_grad():
        plain = tiny_moe.base_model(windows.input_ids, attention_mask=windows.attention_mask)
    hooks = num_hooks(tiny_moe)
    _, result = recorded(tiny_moe, layer)
    assert torch.equal(result.last_hidden_state, plain.last_hidden_state)
    assert num_hooks(tiny_moe) == hooks


def test_no_hook_is_left_when_the_run_fails() -> None:
    model = build("qwen2_moe")
    hooks = num_hooks(model)

    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        record(find_moe_layers(model)[0], torch.ones(1, 2, dtype=torch.bool), fail)
    assert num_hooks(model) == hooks


@pytest.mark.parametrize("family", ["mixtral", *WITH_SHARED])
def test_a_block_that_does_more_is_refused(family: str) -> None:
    model = build(family)
    layer = find_moe_layers(model)[0]

    def tamper(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * 1.01, *output[1:])
        return output * 1.01

    layer.block.register_forward_hook(tamper)
    block, _ = recorded(model, layer)
    message = r"not the weighted sum of its experts and shared expert \(off by 9\.9e-03\); set .*"
    with pytest.raises(InputError, match=rf"{layer.name}: .*{message}refit to null"):
        check_understood(layer, block, output_features(layer, block).values)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_bfloat16_blocks_are_understood(family: str) -> None:
    model = build(family).bfloat16()
    layer = find_moe_layers(model)[0]
    block, _ = recorded(model, layer)
    check_understood(layer, block, output_features(layer, block).values)


@torch.no_grad()
def test_a_batch_without_any_token_is_understood() -> None:
    model = build("qwen2_moe")
    layer = find_moe_layers(model)[0]
    windows = random_windows(2)
    nothing = torch.zeros(2, 9, dtype=torch.bool)
    block, _ = record(layer, nothing, lambda: model.base_model(windows.input_ids))
    features = output_features(layer, block)
    assert len(features.values) == 0
    check_understood(layer, block, features.values)


def test_putting_output_matrices_back_keeps_every_tensor_exactly(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_moe.state_dict().items()}
    for layer in find_moe_layers(tiny_moe):
        set_output_weights(layer, output_weights(layer).clone())
    after = tiny_moe.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_other_output_matrices_change_the_output_matrices_only(tiny_moe: PreTrainedModel) -> None:
    layer = find_moe_layers(tiny_moe)[0]
    before = {name: tensor.clone() for name, tensor in tiny_moe.state_dict().items()}
    wanted = torch.randn(output_weights(layer).shape, generator=torch.Generator().manual_seed(0))
    set_output_weights(layer, wanted)
    assert torch.equal(output_weights(layer), wanted)
    after = tiny_moe.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {name for name in before if layer.name in name and "down_proj" in name} - {
        name for name in before if name.endswith("bias")
    }
