"""What is not understood is refused by name, never skipped."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import MoELayer, decoder_layer_of, find_moe_layers
from tests.families import NUM_EXPERTS, build

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(model_type: str, **options: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**options))
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize(
    ("model_type", "options", "block", "message"),
    [
        (
            "llama4_text",
            {"intermediate_size_mlp": 48, "num_local_experts": NUM_EXPERTS},
            "model.layers.0.feed_forward",
            r"the experts \(Llama4TextExperts\) are laid out in a way that is not understood",
        ),
        (
            "deepseek_v4",
            {"n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": 4},
            "model.layers.0.mlp",
            r"the router \(DeepseekV4HashRouter\) is not one matrix with a row for each",
        ),
        (
            "zaya",
            {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 1, "router_hidden_size": 16},
            "model.layers.0.mlp",
            r"the router \(ZayaRouter\) is not one matrix with a row for each",
        ),
    ],
)
def test_a_block_that_is_not_understood_is_refused_by_what_is_strange_in_it(
    model_type: str, options: dict[str, Any], block: str, message: str
) -> None:
    model = tiny(model_type, **{**SIZES, **options})
    with pytest.raises(InputError, match=message):
        MoELayer(block, model.get_submodule(block))


def test_a_family_that_is_known_to_be_out_of_reach_is_refused_with_its_reason() -> None:
    model = tiny("llama4_text", **SIZES, intermediate_size_mlp=48, num_local_experts=NUM_EXPERTS)
    with pytest.raises(InputError, match="llama4_text cannot be compressed: its experts multiply"):
        find_moe_layers(model)


def test_a_router_that_does_not_say_how_many_experts_it_selects_is_refused() -> None:
    block = build("qwen2_moe").get_submodule("model.layers.0.mlp")
    del block.get_submodule("gate").top_k
    with pytest.raises(InputError, match=r"router \(Qwen2MoeTopKRouter\) does not say how many"):
        MoELayer("model.layers.0.mlp", block)


def test_a_dense_model_is_refused() -> None:
    message = r"the model \(qwen2\) has no mixture-of-experts layer; name a checkpoint that has"
    options = {k: v for k, v in SIZES.items() if k != "moe_intermediate_size"}
    with pytest.raises(InputError, match=message):
        find_moe_layers(tiny("qwen2", **options))


def test_a_module_without_configuration_is_refused_by_its_class() -> None:
    with pytest.raises(InputError, match=r"the model \(Linear\) has no mixture-of-experts layer"):
        find_moe_layers(nn.Linear(2, 2))


def test_a_model_that_claims_experts_and_shows_none_is_not_called_dense() -> None:
    options = {k: v for k, v in SIZES.items() if k != "moe_intermediate_size"}
    model = tiny("qwen2", **options)
    model.config.num_local_experts = 8
    with pytest.raises(InputError, match="the experts of qwen2 are laid out in a way that is not"):
        find_moe_layers(model)


def test_experts_without_a_router_beside_them_are_refused() -> None:
    block = nn.Module()
    block.experts = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp: the experts \(ModuleList\)"):
        MoELayer("model.layers.0.mlp", block)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp", ("model.layers", 3)),
        ("model.language_model.layers.12.mlp.block.0", ("model.language_model.layers", 12)),
        ("model.layers.0", ("model.layers", 0)),
        ("4.mlp", ("", 4)),
    ],
)
def test_the_decoder_layer_is_read_from_the_path(name: str, expected: tuple[str, int]) -> None:
    assert decoder_layer_of(name) == expected


def test_a_block_outside_the_decoder_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.mlp: an expert layer outside the decoder layers"):
        decoder_layer_of("model.mlp")
