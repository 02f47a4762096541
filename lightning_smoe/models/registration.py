"""The configurations of mapped models, made known to transformers."""

from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_smoe.models.modeling_smoe import TYPE_PREFIX, mapped_config

# Each costs milliseconds, so not all of transformers; others are registered when one is saved or
# loaded.
_FAMILIES = (
    "afmoe",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "flex_olmo",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "jamba",
    "lfm2_moe",
    "minimax",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
)


def register_families() -> None:
    """Lets AutoConfig, and with it every Auto class, know the mapped models of many families."""
    for family in _FAMILIES:
        register(family)


def register(family: str) -> None:
    """Registers the mapped configuration of a family, unless this transformers lacks the family.

    Args:
        family: Its model type, with or without the prefix of mapped ones.
    """
    name = family.removeprefix(TYPE_PREFIX)
    if name in CONFIG_MAPPING:
        stock: Any = CONFIG_MAPPING[name]
        config = mapped_config(stock)
        AutoConfig.register(config.model_type, config, exist_ok=True)
