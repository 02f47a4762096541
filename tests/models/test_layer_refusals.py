"""What is not understood is refused by name, never skipped."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import MoELayer, decoder_layer_of, find_moe_layers
from tests.families import NUM_EXPERTS

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
    ("model_type", "options", "message"),
    [
        (
            "llama4_text",
            {"intermediate_size_mlp": 48, "num_local_experts": NUM_EXPERTS},
            r"model\.layers\.0\.feed_forward: the experts \(Llama4TextExperts\) are laid out",
        ),
        (
            "jetmoe",
            {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "kv_channels": 8},
            r"model\.layers\.0\.self_attention: the experts \(JetMoeMoA\) are laid out",
        ),
        (
            "gemma4_text",
            {
                "enable_moe_block": True,
                "num_experts": NUM_EXPERTS,
                "top_k_experts": 4,
                "global_head_dim": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 256,
                "num_kv_shared_layers": 0,
            },
            r"model\.layers\.0: the router \(Gemma4TextRouter\) is not one matrix with a row for "
            "each of 12 experts",
        ),
        (
            "deepseek_v4",
            {"n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": 4},
            r"model\.layers\.0\.mlp: the router \(DeepseekV4HashRouter\) is not one matrix",
        ),
    ],
)
def test_a_family_that_is_not_understood_is_refused_by_name(
    model_type: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        find_moe_layers(tiny(model_type, **{**SIZES, **options}))


def test_dbrx_is_refused_by_name() -> None:
    model = tiny(
        "dbrx",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        vocab_size=256,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 12, "moe_top_k": 4},
    )
    message = r"transformer\.blocks\.0\.ffn: the experts \(DbrxExperts\) are laid out"
    with pytest.raises(InputError, match=message):
        find_moe_layers(model)


def test_longcat_flash_with_its_zero_experts_is_refused_by_name() -> None:
    model = tiny(
        "longcat_flash",
        **{k: v for k, v in SIZES.items() if k not in {"num_hidden_layers", "intermediate_size"}},
        num_layers=2,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=24,
        n_routed_experts=NUM_EXPERTS,
        zero_expert_num=5,
        moe_topk=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    message = r"model\.layers\.0\.mlp: the experts \(LongcatFlashExperts\) are laid out"
    with pytest.raises(InputError, match=message):
        find_moe_layers(model)


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
