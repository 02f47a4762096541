"""Tiny random models of every MoE layout the package must read, built by transformers itself."""

import re
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.more_families import MORE_FAMILIES

NUM_EXPERTS: Final = 12
VOCAB_SIZE: Final = 256
# The special tokens of checkpoints/qwen2moe-tiny-8dom, whose tokenizer is saved beside models.
EOS_TOKEN_ID: Final = 0
PAD_TOKEN_ID: Final = 1

# Standard deviations, so chosen that the best expert of a token leads clearly (logits spread over
# several units) and that the experts, not the embeddings, decide the logits.
SPREADS: Final[tuple[tuple[str, float], ...]] = (
    (r"e_score_correction_bias$|expert_bias$|\.router\.bias$", 0.1),
    (r"\.(gate|router|shared_expert_gate|wg|router\.proj)\.weight$", 0.5),
    (r"\.experts\..*_bias$", 0.05),
    (r"\.(experts|shared_experts?)\.", 0.15),
)


def _config(model_type: str, **options: Any) -> PretrainedConfig:
    """Configuration of a family with the sizes all of them share."""
    shared: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": EOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
        "tie_word_embeddings": False,
    }
    config = CONFIG_MAPPING[model_type](**{**shared, **options})
    if not isinstance(config, PretrainedConfig):
        raise TypeError(f"{model_type} has no configuration in this version of transformers")
    return config


def _multi_latent(model_type: str, **options: Any) -> PretrainedConfig:
    """Configuration of a DeepSeek model: latent attention, the first layer dense."""
    return _config(
        model_type,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=4,
        **options,
    )


_FAMILIES: Final[dict[str, Callable[[], PretrainedConfig]]] = {
    "qwen2_moe": lambda: _config(
        "qwen2_moe",
        num_hidden_layers=3,
        mlp_only_layers=[1],
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=4,
    ),
    "qwen3_moe": lambda: _config(
        "qwen3_moe",
        num_hidden_layers=3,
        mlp_only_layers=[1],
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        head_dim=8,
    ),
    "mixtral": lambda: _config(
        "mixtral", intermediate_size=24, num_local_experts=NUM_EXPERTS, num_experts_per_tok=2
    ),
    "olmoe": lambda: _config(
        "olmoe", intermediate_size=24, num_experts=NUM_EXPERTS, num_experts_per_tok=4
    ),
    "deepseek_v2": lambda: _multi_latent(
        "deepseek_v2", n_shared_experts=2, n_group=1, topk_group=1, topk_method="greedy"
    ),
    "deepseek_v3": lambda: _multi_latent(
        "deepseek_v3", n_shared_experts=1, n_group=2, topk_group=1
    ),
    "glm4_moe": lambda: _config(
        "glm4_moe",
        num_hidden_layers=3,
        first_k_dense_replace=1,
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        head_dim=8,
    ),
    "gpt_oss": lambda: _config(
        "gpt_oss",
        intermediate_size=24,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=4,
        head_dim=8,
        # What the family's YaRN factor of 32 over 4096 positions implies; another length warns.
        max_position_embeddings=131072,
    ),
    "granitemoe": lambda: _config(
        "granitemoe", intermediate_size=24, num_local_experts=NUM_EXPERTS, num_experts_per_tok=4
    ),
    "ernie4_5_moe": lambda: _config(
        "ernie4_5_moe",
        num_hidden_layers=3,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
        intermediate_size=48,
        moe_intermediate_size=24,
        moe_num_experts=NUM_EXPERTS,
        moe_k=4,
        moe_num_shared_experts=1,
    ),
    "phimoe": lambda: _config(
        "phimoe", intermediate_size=24, num_local_experts=NUM_EXPERTS, num_experts_per_tok=2
    ),
    "minimax_m2": lambda: _config(
        "minimax_m2",
        intermediate_size=24,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=4,
        head_dim=8,
    ),
}

# Every family that can be compressed. What holds for a layout is tested on one family of it, the
# fixture `family`; what may differ between two of one layout, on all of these.
ALL_FAMILIES: Final = {**_FAMILIES, **MORE_FAMILIES}
# One of each layout: a gated shared expert and a dense layer within; experts in stacks on disk,
# softmax after the choice; groups, selection bias and shared expert; transposed and interleaved
# matrices with biases, a tuple as output; another field for the count, a bias beside softmax.
FAMILIES: Final = {
    name: _FAMILIES[name]
    for name in ("qwen2_moe", "granitemoe", "deepseek_v3", "gpt_oss", "ernie4_5_moe")
}


def build(family: str, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> PreTrainedModel:
    """Builds a random float32 model of a family in eval mode, whose routing is decisive.

    Args:
        family: A key of `ALL_FAMILIES`.
        seed: Seed of every weight; equal seeds give equal models. The global generator is left
            as it was.
        vocab_size: Rows of the embedding, in tokens.
    """
    config = ALL_FAMILIES[family]()
    config.vocab_size = vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{family} gives a {type(model).__name__}")
    _randomize(model, torch.Generator().manual_seed(seed + 1))
    return model


def _randomize(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Redraws routers, experts and their biases, which transformers starts near or at zero."""
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        spread = next((value for pattern, value in SPREADS if re.search(pattern, name)), None)
        if spread is not None:
            with torch.no_grad():
                tensor.copy_(spread * torch.randn(tensor.shape, generator=generator))
