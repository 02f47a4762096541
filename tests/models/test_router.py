"""The tensors of a router that have an expert axis."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.router import RouterTensor, assign, find_router_tensors
from tests.families import ALL_FAMILIES, NUM_EXPERTS, build

# What a router has beside its weight.
BESIDE_THE_WEIGHT = {
    "gpt_oss": ["bias"],
    "deepseek_v3": ["selection"],
    "ernie4_5_moe": ["selection"],
}


def tensors_of(model: nn.Module) -> list[RouterTensor]:
    return find_moe_layers(model)[0].router_tensors


def test_every_tensor_with_an_expert_axis_is_found_with_its_role(
    family: str, tiny_moe: PreTrainedModel
) -> None:
    found = tensors_of(tiny_moe)
    assert [tensor.kind for tensor in found] == ["weight", *BESIDE_THE_WEIGHT.get(family, [])]
    assert all(tensor.rows.shape[0] == NUM_EXPERTS for tensor in found)


def test_a_selection_bias_that_the_block_holds_is_found() -> None:
    model = build("minimax_m2")
    block = find_moe_layers(model)[0].block
    assert tensors_of(model)[1].owner is block


def test_rows_of_shared_experts_stay_behind_those_of_routed_ones() -> None:
    weight = tensors_of(build("inkling_text"))[0]
    stored: Tensor = getattr(weight.owner, weight.attribute).clone()
    assert weight.rows.shape[0] == NUM_EXPERTS
    weight.set(weight.rows[:8])
    after: Tensor = getattr(weight.owner, weight.attribute)
    assert torch.equal(after, torch.cat([stored[:8], stored[NUM_EXPERTS:]]))


def test_the_router_is_what_multiplies_states_with_its_rows(tokens: Tensor) -> None:
    model = build("gemma4_text")
    layer = find_moe_layers(model)[0]
    seen: list[tuple[Tensor, Tensor]] = []
    layer.router.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    model(tokens)
    states, logits = seen[0]
    weight = next(tensor for tensor in layer.router_tensors if tensor.kind == "weight")
    torch.testing.assert_close(states @ weight.rows.T, logits)
    assert layer.router_logits(logits).shape == (tokens.numel(), NUM_EXPERTS)


@pytest.mark.parametrize(
    ("family", "apart"), [("gemma4_text", True), ("nemotron_h", False), ("gpt_oss", False)]
)
def test_a_router_that_reads_what_its_experts_do_not_is_told(family: str, apart: bool) -> None:
    assert find_moe_layers(build(family))[0].router_reads_apart is apart


def test_experts_in_a_space_of_their_own_read_apart_from_the_router() -> None:
    config = ALL_FAMILIES["nemotron_h"]()
    config.moe_latent_size = 16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert find_moe_layers(model)[0].router_reads_apart


def test_the_number_of_selected_experts_may_stand_in_the_configuration_alone() -> None:
    assert find_moe_layers(build("gemma4_text"))[0].top_k == 4


def test_rows_put_back_change_nothing(tiny_moe: PreTrainedModel) -> None:
    for tensor in tensors_of(tiny_moe):
        before: Tensor = getattr(tensor.owner, tensor.attribute).clone()
        tensor.set(tensor.rows)
        after: Tensor = getattr(tensor.owner, tensor.attribute)
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_an_expert_axis_that_comes_last_stays_last() -> None:
    bias = tensors_of(build("ernie4_5_moe"))[1]
    bias.set(bias.rows[:8])
    stored: Tensor = getattr(bias.owner, bias.attribute)
    assert stored.shape == (1, 8)


def test_a_tensor_of_another_size_is_left_alone() -> None:
    router = nn.Linear(6, 4)
    router.temperature = nn.Parameter(torch.ones(()))
    router.norm_bias = nn.Parameter(torch.ones(6))
    found = find_router_tensors(router, nn.Module(), 4)
    assert [(t.attribute, t.kind) for t in found] == [("weight", "weight"), ("bias", "bias")]


def test_an_assigned_parameter_keeps_its_type_and_whether_it_learns() -> None:
    layer = nn.Linear(3, 2).bfloat16().requires_grad_(False)
    assign(layer, "weight", torch.full((5, 3), 1.0009765625))
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad
    assert torch.equal(layer.weight, torch.ones(5, 3, dtype=torch.bfloat16))


def test_an_assigned_buffer_stays_a_buffer() -> None:
    module = nn.Module()
    module.register_buffer("bias", torch.zeros(4))
    assign(module, "bias", torch.ones(2))
    assert [name for name, _ in module.named_buffers()] == ["bias"]
    assert not list(module.parameters())


def test_an_assigned_view_is_copied_and_made_contiguous() -> None:
    layer, values = nn.Linear(3, 2), torch.arange(12.0).view(3, 4)
    assign(layer, "weight", values.T[:2])
    values.zero_()
    assert layer.weight.is_contiguous()
    assert torch.equal(layer.weight, torch.tensor([[0.0, 4.0, 8.0], [1.0, 5.0, 9.0]]))
    assert layer.weight.untyped_storage().nbytes() == 6 * 4
