"""The experts of a block in one layout: what they compute, and what belongs to which part."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from tests.families import NUM_EXPERTS
from tests.models.pruning import unchanged_rows

SHARED = {"qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe"}


def states_for(layer: MoELayer, num_tokens: int = 5) -> Tensor:
    return torch.randn(num_tokens, layer.hidden_size, generator=torch.Generator().manual_seed(3))


def test_replacing_experts_by_themselves_keeps_every_bit(tiny_moe: PreTrainedModel) -> None:
    before = {key: tensor.clone() for key, tensor in tiny_moe.state_dict().items()}
    for layer in find_moe_layers(tiny_moe):
        layer.replace(layer.weights(), unchanged_rows)
    after = tiny_moe.state_dict()
    assert list(after) == list(before)
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=0)


def test_one_layout_serves_every_family(family: str, tiny_moe: PreTrainedModel) -> None:
    weights = find_moe_layers(tiny_moe)[0].weights()
    has_bias = family == "gpt_oss"
    assert weights.up_proj.shape == (NUM_EXPERTS, 24, 32)
    assert weights.gate_proj is not None
    assert weights.gate_proj.shape == (NUM_EXPERTS, 24, 32)
    assert weights.down_proj.shape == (NUM_EXPERTS, 32, 24)
    for bias, size in ((weights.gate_bias, 24), (weights.up_bias, 24), (weights.down_bias, 32)):
        assert (bias is not None) == has_bias
        assert bias is None or bias.shape == (NUM_EXPERTS, size)


def gated(family: str, gate: Tensor, up: Tensor) -> Tensor:
    """What each family's paper applies its output matrix to."""
    if family == "gpt_oss":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return torch.nn.functional.silu(gate) * up


def expert_by_hand(family: str, weights: ExpertWeights, expert: int, state: Tensor) -> Tensor:
    assert weights.gate_proj is not None
    gate, up = weights.gate_proj[expert] @ state, weights.up_proj[expert] @ state
    if weights.gate_bias is not None and weights.up_bias is not None:
        gate, up = gate + weights.gate_bias[expert], up + weights.up_bias[expert]
    output = weights.down_proj[expert] @ gated(family, gate, up)
    return output if weights.down_bias is None else output + weights.down_bias[expert]


@torch.no_grad()
def test_the_output_matrix_on_the_activations_is_the_experts_output(
    family: str, tiny_moe: PreTrainedModel
) -> None:
    layer = find_moe_layers(tiny_moe)[0]
    states, weights = states_for(layer), layer.weights()
    for expert in range(NUM_EXPERTS):
        output = layer.activations(states, expert) @ weights.down_proj[expert].T
        if weights.down_bias is not None:
            output = output + weights.down_bias[expert]
        loop = [expert_by_hand(family, weights, expert, x) for x in states]
        torch.testing.assert_close(output, torch.stack(loop), rtol=1e-5, atol=1e-5)
        chosen, ones = torch.full((len(states), 1), expert), torch.ones(len(states), 1)
        torch.testing.assert_close(
            output, layer.experts(states, chosen, ones), rtol=1e-5, atol=1e-5
        )


def test_router_experts_and_shared_experts_are_all_the_parameters_of_a_block(
    family: str, tiny_moe: PreTrainedModel
) -> None:
    layer = find_moe_layers(tiny_moe)[0]
    found = [*layer.parameters_of("router"), *layer.parameters_of("experts")]
    found += layer.parameters_of("shared")
    fixed = set(map(id, layer.selection_tensors()))
    trained = [p for p in layer.block.parameters() if id(p) not in fixed]
    assert sorted(map(id, found)) == sorted(map(id, trained))
    assert (family in SHARED) == bool(layer.parameters_of("shared"))


def test_the_shared_expert_is_found_with_its_gate(family: str, tiny_moe: PreTrainedModel) -> None:
    found = find_moe_layers(tiny_moe)[0].shared_expert
    assert (found is not None) == (family in SHARED)
    if found is not None:
        down_proj, gate = found
        assert down_proj.out_features == 32
        assert (gate is not None) == (family == "qwen2_moe")


@torch.no_grad()
def test_experts_without_a_gate_have_the_same_laws() -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 32,
        "layers_block_type": ["attention", "moe"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "n_routed_experts": NUM_EXPERTS,
        "num_experts_per_tok": 4,
    }
    config = CONFIG_MAPPING["nemotron_h"](**sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layer = find_moe_layers(model)[0]
    weights = layer.weights()
    assert weights.gate_proj is None
    states = states_for(layer)
    outputs = layer.activations(states, 7) @ weights.down_proj[7].T
    loop = [weights.down_proj[7] @ (weights.up_proj[7] @ x).relu().square() for x in states]
    torch.testing.assert_close(outputs, torch.stack(loop))
    layer.select(torch.tensor([7, 2, 3, 4]))
    assert torch.equal(layer.weights().up_proj[0], weights.up_proj[7])
