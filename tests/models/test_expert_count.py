"""The number of experts in configurations: that number changes, and nothing else."""

import copy
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models.expert_count import COUNT_FIELDS, patch_expert_count, text_config
from tests.families import FAMILIES, NUM_EXPERTS, build
from tests.models.pruning import prune


@pytest.mark.parametrize("field", COUNT_FIELDS)
def test_only_the_number_of_experts_changes(field: str) -> None:
    config = {"model_type": "x", "num_hidden_layers": 60, field: 60, "extra": {field: 60}}
    before = copy.deepcopy(config)
    patched = patch_expert_count(config, 60, 30)
    assert patched == {**config, field: 30}
    assert list(patched) == list(config)
    assert config == before


def test_every_field_that_holds_the_number_is_changed() -> None:
    config = {"num_experts": 60, "num_local_experts": 60, "n_routed_experts": None}
    expected = {"num_experts": 30, "num_local_experts": 30, "n_routed_experts": None}
    assert patch_expert_count(config, 60, 30) == expected


def test_a_language_model_nested_in_another_configuration_is_changed() -> None:
    config: dict[str, Any] = {
        "vision_config": {"num_experts": 60},
        "text_config": {"num_experts": 60, "hidden_size": 60},
    }
    patched = patch_expert_count(config, 60, 30)
    assert patched["text_config"] == {"num_experts": 30, "hidden_size": 60}
    assert patched["vision_config"] == {"num_experts": 60}


@pytest.mark.parametrize(
    "config",
    [{"hidden_size": 60}, {"num_experts": 64}, {"text_config": {"num_experts": 64}}],
)
def test_a_configuration_without_the_number_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"config\.json names 60 experts in none of num_experts, "):
        patch_expert_count(config, 60, 30)


def test_model_and_configuration_in_memory_know_the_new_number(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    prune(tiny_moe, 8)
    config = text_config(tiny_moe.config)
    stated = [getattr(config, field) for field in COUNT_FIELDS if hasattr(config, field)]
    assert stated
    assert set(stated) == {8}
    for module in (tiny_moe, tiny_moe.base_model):
        assert NUM_EXPERTS not in [v for k, v in vars(module).items() if "experts" in k]


@pytest.mark.parametrize(
    "family",
    # The others have no such loss.
    [name for name in FAMILIES if name not in {"deepseek_v2", "deepseek_v3", "glm4_moe"}],
)
def test_the_load_balancing_loss_of_transformers_runs_on_a_pruned_model(
    family: str, tokens: Tensor
) -> None:
    model = build(family)
    prune(model, 8)
    assert model(tokens, labels=tokens, output_router_logits=True).aux_loss.isfinite()
