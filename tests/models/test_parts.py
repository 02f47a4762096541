"""The parts of a model, found in every family by how it is built."""

from itertools import combinations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.parts import Part, linear_modules, matrices, parameters_of_parts
from tests.families import FAMILIES, build

# Parts of which no two share a parameter.
APART: tuple[Part, ...] = ("router", "norm", "shared", "experts", "attention")
WITH_SHARED_EXPERT = {"qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe"}
# Normalisations of queries, keys or latents, in each decoder layer.
INNER_NORMS = {"qwen3_moe": 2, "olmoe": 2, "deepseek_v2": 1, "deepseek_v3": 1, "minimax_m2": 2}


def test_parts_share_nothing_and_leave_only_embeddings_dense_blocks_and_the_last_norm(
    tiny_moe: PreTrainedModel,
) -> None:
    found = parameters_of_parts(tiny_moe)
    for one, other in combinations(APART, 2):
        assert not found[one].keys() & found[other].keys()
    left = found["all"].keys() - {name for part in APART for name in found[part]}
    outside = {"model.embed_tokens.weight", "model.norm.weight", "model.norm.bias"}
    outside |= {"lm_head.weight", "lm_head.bias"}
    sparse = {layer.name for layer in find_moe_layers(tiny_moe)}
    for name in left - outside:
        assert ".mlp." in name
        assert name.split(".mlp.")[0] + ".mlp" not in sparse


def test_each_part_holds_what_its_name_says(family: str, tiny_moe: PreTrainedModel) -> None:
    found = parameters_of_parts(tiny_moe)
    assert all(".self_attn." in name for name in found["attention"])
    assert all("norm" in name.rsplit(".", 2)[-2] for name in found["norm"])
    assert all(parameter.dim() == 1 for parameter in found["norm"].values())
    assert all(".experts." in name for name in found["experts"])
    assert bool(found["shared"]) == (family in WITH_SHARED_EXPERT)
    num_layers = tiny_moe.config.num_hidden_layers
    scales = [name for name in found["norm"] if name.endswith("weight")]
    assert len(scales) == num_layers * (2 + INNER_NORMS.get(family, 0))
    sparse = len(find_moe_layers(tiny_moe))
    assert len(found["down_proj"]) == sparse
    assert all(name.endswith(".experts.down_proj") for name in found["down_proj"])
    assert found["down_proj"].items() <= found["experts"].items()
    assert len(matrices(tiny_moe, "router")) == sparse
    assert len(matrices(tiny_moe, "experts")) == 2 * sparse
    assert len(linear_modules(tiny_moe, "attention")) >= 4 * num_layers


def test_sinks_of_attention_are_attention_but_no_matrix() -> None:
    model = build("gpt_oss")
    assert "model.layers.0.self_attn.sinks" in parameters_of_parts(model)["attention"]
    assert "model.layers.0.self_attn.q_proj" in linear_modules(model, "attention")


def test_tensors_that_only_select_are_in_no_part() -> None:
    model = build("ernie4_5_moe")
    named = {name for name, _ in model.named_parameters()}
    apart = named - parameters_of_parts(model)["all"].keys()
    assert apart
    assert all(name.endswith("e_score_correction_bias") for name in apart)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_an_outline_has_the_same_parts(family: str) -> None:
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(FAMILIES[family]())
    found, expected = parameters_of_parts(outline), parameters_of_parts(build(family))
    assert {part: list(names) for part, names in found.items()} == {
        part: list(names) for part, names in expected.items()
    }
