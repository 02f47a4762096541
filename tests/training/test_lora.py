"""What adapters are put beside, and what is refused."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.training.lora import Lora, check_lora, find_targets, lora_config
from lightning_smoe.training.trainable import find_trained
from tests.families import FAMILIES, build

RATE = 1e-3
EVERYTHING = Lora(targets=["attention", "experts", "router"])


def test_every_adapted_weight_is_named_in_full_and_the_rest_is_not() -> None:
    config = lora_config(build("deepseek_v3"), Lora(rank=4, alpha=6.0))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 6.0, 0.0)
    assert len(config.target_modules) == 3 * 4
    assert "model.layers.0.self_attn.kv_b_proj" in config.target_modules
    block = "model.layers.1.mlp"
    matrices = ("gate_proj", "up_proj", "down_proj")
    shared = {f"{block}.shared_experts.{matrix}.weight" for matrix in matrices}
    experts = {f"{block}.experts.gate_up_proj", f"{block}.experts.down_proj"}
    assert {n for n in config.target_parameters if n.startswith(block)} == shared | experts


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_an_outline_tells_what_is_adapted(family: str) -> None:
    with torch.device("meta"):
        outline: Any = AutoModelForCausalLM.from_config(FAMILIES[family]())
    model = build(family)
    assert find_targets(outline, EVERYTHING) == find_targets(model, EVERYTHING)
    check_lora(outline, Lora(), find_trained(outline, ["router"], RATE))


@pytest.mark.parametrize(
    ("trainable", "lora", "match"),
    [
        (("down_proj",), Lora(), r"trains .*down_proj in full \(down_proj\).* adapts it too"),
        ((), Lora(targets=["shared"]), "lora.targets names shared, which the model does not have"),
    ],
)
def test_adapters_that_do_not_go_with_the_model_are_refused(
    trainable: Sequence[str], lora: Lora, match: str
) -> None:
    model = build("mixtral")
    groups = find_trained(model, trainable, RATE)
    with pytest.raises(InputError, match=match):
        check_lora(model, lora, groups)


def test_a_layer_of_one_expert_is_refused() -> None:
    model = build("gpt_oss")
    layer = find_moe_layers(model)[1]
    layer.share(layer.weights().select(torch.arange(1)), torch.zeros(12, dtype=torch.int64))
    with pytest.raises(InputError, match=r"layers.1.mlp.experts\.\w+ is of one expert"):
        check_lora(model, Lora(), ())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": 0}, "rank=0 must be 1 or more"),
        ({"alpha": 0.0}, "alpha=0.0 above 0"),
        ({"targets": ()}, "targets is empty"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"dropout": 0.1}, r"peft can drop inputs of attention alone.*targets to \[attention\]"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
    ],
)
def test_settings_that_no_model_could_take_are_refused_at_once(
    settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        Lora(**settings)
    Lora(targets=["attention"], dropout=0.1)
