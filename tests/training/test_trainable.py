"""What is trained, at which learning rate, and what is refused."""

import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models.parts import parameters_of_parts
from lightning_smoe.training.trainable import (
    TrainedGroup,
    check_trainable,
    find_trained,
    hold_trainable,
)
from tests.families import FAMILIES, build

RATE = 0.01


def half(family: str) -> PreTrainedModel:
    """A model in bfloat16."""
    model = build(family)
    model.to(torch.bfloat16)  # type: ignore[arg-type]  # declared wrongly in transformers 5.23
    return model


def find(model: PreTrainedModel, trainable: Any) -> list[TrainedGroup]:
    return find_trained(model, trainable, RATE)


def step(model: PreTrainedModel, groups: list[TrainedGroup], tokens: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(
        [{"params": [*g.parameters.values()], "lr": g.learning_rate} for g in groups]
    )
    model(tokens).logits.square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("part", ["router", "norm", "down_proj", "experts", "attention", "all"])
def test_only_the_named_part_changes(part: Any, tokens: torch.Tensor) -> None:
    model = build("qwen2_moe")
    groups = find(model, [part])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    hold_trainable(model, groups)
    step(model, groups, tokens)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(parameters_of_parts(model)[part])
    (group,) = groups
    assert group.num_parameters == sum(p.numel() for p in group.parameters.values())


def test_all_trains_everything_but_what_only_selects(tiny_moe: PreTrainedModel) -> None:
    hold_trainable(tiny_moe, find(tiny_moe, ["all"]))
    frozen = {name for name, p in tiny_moe.named_parameters() if not p.requires_grad}
    assert all(name.endswith("e_score_correction_bias") for name in frozen)


def test_names_in_a_list_share_a_learning_rate_and_in_a_mapping_have_their_own() -> None:
    model = build("qwen2_moe")
    listed = find(model, ["router", "norm"])
    assert [(g.name, g.learning_rate) for g in listed] == [("router", RATE), ("norm", RATE)]
    mapped = find(model, {"router": 0.1, "norm": 0.2})
    assert [(g.name, g.learning_rate) for g in mapped] == [("router", 0.1), ("norm", 0.2)]


def test_names_joined_by_a_plus_are_one_group() -> None:
    model = build("qwen2_moe")
    parts = parameters_of_parts(model)
    (group,) = find(model, ["router+norm"])
    assert group.parameters.keys() == parts["router"].keys() | parts["norm"].keys()


def test_a_parameter_named_twice_belongs_to_the_first_name() -> None:
    model = build("qwen2_moe")
    groups = find(model, {"down_proj": 0.1, "experts": 0.2, "all": 0.3})
    names = [name for group in groups for name in group.parameters]
    assert len(names) == len(set(names)) == len(parameters_of_parts(model)["all"])
    assert all(name.endswith("experts.down_proj") for name in groups[0].parameters)
    assert all(name.endswith("experts.gate_up_proj") for name in groups[1].parameters)


def test_a_regular_expression_is_searched_in_full_names() -> None:
    model = build("qwen2_moe")
    (group,) = find(model, [r"layers\.[02]\.mlp\.gate\.|embed"])
    assert list(group.parameters) == [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.2.mlp.gate.weight",
    ]


def test_trained_parts_are_held_in_float32_and_the_others_keep_their_type() -> None:
    model = half("qwen2_moe")
    hold_trainable(model, find(model, ["router"]))
    routers = parameters_of_parts(model)["router"]
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if name in routers else torch.bfloat16
        assert parameter.dtype == wanted
        assert parameter.requires_grad == (name in routers)


def test_an_outline_tells_what_would_be_trained() -> None:
    with torch.device("meta"):
        outline: Any = AutoModelForCausalLM.from_config(FAMILIES["qwen2_moe"]())
    names = ["router", "shared", "q_proj"]
    counts = [(g.name, g.num_parameters) for g in find(outline, names)]
    assert counts == [(g.name, g.num_parameters) for g in find(build("qwen2_moe"), names)]


@pytest.mark.parametrize(
    ("trainable", "match"),
    [
        (["routers"], "names routers, which is none of router, norm.*; near it are router"),
        (["gate.wieght"], "matches no parameter; near it are gate.weight"),
        (["e_score_correction_bias"], "names e_score_correction_bias, which is none of"),
        (["router", "shared"], "names shared, which the model does not have"),
        (["router+shared"], "names shared, which the model does not have"),
        (["all", "router"], "names router after others that hold all of it; put it first"),
    ],
)
def test_a_name_that_finds_nothing_is_refused(trainable: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        find(build("minimax_m2"), trainable)


@pytest.mark.parametrize(
    ("trainable", "match"),
    [
        ((), "trainable is empty; name router, norm, shared, down_proj, experts, attention or all"),
        ({}, "trainable is empty"),
        (["rout("], r"names rout\(, which is none of .* no regular expression either: missing \)"),
        ({"router": 0.0}, "learning rates must be above 0"),
        ("router", re.escape("must be a list; write [router]")),
    ],
)
def test_settings_that_no_model_could_take_are_refused_at_once(trainable: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_trainable(trainable)


def test_nothing_needs_to_be_trained_in_full_beside_adapters() -> None:
    check_trainable((), is_needed=False)
    assert find(build("mixtral"), ()) == []
