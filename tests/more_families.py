"""Tiny configurations of the other families of transformers, as what differs from common sizes."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# By the field that a family has for it; a family gets those that it has.
_SIZES: Final[dict[str, Any]] = {
    "vocab_size": 256,
    "unpadded_vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "shared_experts_intermediate_size": 40,
    "shared_intermediate_size": 40,
    "num_experts": 12,
    "num_local_experts": 12,
    "n_routed_experts": 12,
    "moe_num_experts": 12,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Experts as wide as the dense block of others, for families that have no other width.
_NARROW: Final = {"intermediate_size": 24}
_LATENT: Final = {"num_key_value_heads": 4}
_MAMBA: Final = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
_WINDOWED: Final = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
}
_LINEAR: Final = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING: Final = {"layer_types": ["sliding_attention", "full_attention"]}
_DENSE_FIRST: Final = {"mlp_layer_types": ["dense", "sparse"]}

_DIFFERENCES: Final[dict[str, dict[str, Any]]] = {
    "afmoe": {},
    "aria_text": {**_NARROW, "moe_topk": 4},
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": {**_LATENT, "layer_group_size": 2},
    "beam": {**_DENSE_FIRST, **_SLIDING},
    "cohere2_moe": {**_NARROW, **_SLIDING},
    "deepseek_v32": _LATENT,
    "dots1": {},
    "dots3_note_text": {
        **_LATENT,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "exaone_moe": {},
    "flex_olmo": _NARROW,
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {
        **_SLIDING,
        "enable_moe_block": True,
        "top_k_experts": 4,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 256,
        "tie_word_embeddings": True,
    },
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "granitemoe_swa": _NARROW,
    "granitemoehybrid": {
        **_NARROW,
        **_MAMBA,
        "layer_types": ["mamba", "attention"],
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "granitemoeshared": _NARROW,
    "hunyuan_v1_moe": {**_NARROW, "moe_topk": 4},
    "hy_v3": {},
    "hy_v4": _LATENT,
    "inkling2_text": _WINDOWED,
    "inkling_text": {**_WINDOWED, "n_shared_experts": 2},
    "jamba": {
        **_NARROW,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "kimi_linear": {**_LATENT, **_LINEAR, "linear_head_dim": 8, "linear_num_heads": 4},
    "kolibri1": {},
    "laguna": {},
    "lara_mini": {"layer_types": ["linear_attention", "sliding_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {**_NARROW, "num_experts_per_tok": 2, "block_size": 8},
    "minimax_m3_vl_text": {**_NARROW, "dense_intermediate_size": 48, "rotary_dim": 4},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "moe_shared_expert_intermediate_size": 40,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp_text": {
        **_LINEAR,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "solar_open": {},
}


def _config(family: str) -> PretrainedConfig:
    # Any: the mapping is declared to hold classes of no known arguments.
    family_class: Any = CONFIG_MAPPING[family]
    fields = {field.name for field in dataclasses.fields(family_class)}
    sizes = {name: size for name, size in _SIZES.items() if name in fields}
    config = family_class(**{**sizes, **_DIFFERENCES[family]})
    if not isinstance(config, PretrainedConfig):
        raise TypeError(f"{family} has no configuration in this version of transformers")
    return config


# Those that this version of transformers has, which may be an older one.
MORE_FAMILIES: Final[dict[str, Callable[[], PretrainedConfig]]] = {
    family: partial(_config, family) for family in _DIFFERENCES if family in CONFIG_MAPPING
}
