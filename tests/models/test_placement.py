"""A model that is larger than its device gives the same logits, or nearly the same in 8 bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from lightning_smoe.data.text import TextDataModule
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.placement import PlacedModel, brought
from lightning_smoe.models.resting import RoundedTensor
from lightning_smoe.models.walk import decoder_layers
from tests.families import build

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "qwen2moe-tiny-8dom"
CPU, META = torch.device("cpu"), torch.device("meta")


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    found: Tensor = model(tokens, use_cache=False).logits
    return found


def test_an_offloaded_model_gives_the_same_logits_and_comes_back_as_it_was(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    before = logits(tiny_moe, tokens)
    own = {name: tensor.clone() for name, tensor in tiny_moe.state_dict().items()}
    places = {name: parameter.data_ptr() for name, parameter in tiny_moe.named_parameters()}
    placed = PlacedModel(tiny_moe, offload=True)
    placed.place(CPU)
    assert torch.equal(logits(tiny_moe, tokens), before)
    assert all(torch.equal(tiny_moe.state_dict()[name], own[name]) for name in own)
    assert {n: p.data_ptr() for n, p in tiny_moe.named_parameters()} == places


def test_only_the_layer_that_runs_is_on_the_device() -> None:
    model = build("qwen3_moe")
    layers: list[Any] = list(decoder_layers(model))
    seen: list[list[str]] = []

    def note(*_: object) -> None:
        seen.append([next(layer.parameters()).device.type for layer in layers])

    for layer in layers:
        layer.self_attn.register_forward_hook(note)
        # How many tokens an expert gets is known where there are numbers only.
        layer.mlp.forward = lambda states: states
    placed = PlacedModel(model, offload=True)
    # The meta device stands for one that is not the main memory.
    placed.place(META)
    # A mask is given because to make one, transformers looks at numbers.
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=META)
    tokens = torch.zeros(1, 4, dtype=torch.int64, device=META)
    model(tokens, attention_mask=mask, use_cache=False)
    assert seen == [["meta", "cpu", "cpu"], ["cpu", "meta", "cpu"], ["cpu", "cpu", "meta"]]
    assert model.get_input_embeddings().weight.device == META
    assert {p.device.type for layer in layers for p in layer.parameters()} == {"cpu"}


@pytest.mark.parametrize("options", [{"offload": True}, {"rounded": True}])
def test_a_layer_by_itself_runs_where_it_is_brought(options: dict[str, bool]) -> None:
    model = build("qwen3_moe")
    placed = PlacedModel(model, **options)
    placed.place(CPU)
    layer: Any = decoder_layers(model)[1]
    seen: list[str] = []
    layer.forward = lambda: seen.append(layer.mlp.gate_proj.weight.device.type)
    with brought(layer, META):
        layer()
    layer()
    assert seen == ["meta", "cpu"]


@pytest.mark.parametrize("axis", [1, 2])
def test_rounding_is_to_the_nearest_of_255_values_in_each_output_channel(axis: int) -> None:
    matrix = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    matrix[0].select(2 - axis, 0).zero_()
    rounded = RoundedTensor.of(matrix, (axis,)).fetch(CPU)
    for expert, found in zip(matrix, rounded, strict=True):
        channels = zip(expert.unbind(2 - axis), found.unbind(2 - axis), strict=True)
        for channel, again in channels:
            step = max(abs(value) for value in channel.tolist()) / 127
            for value, near in zip(channel.tolist(), again.tolist(), strict=True):
                assert near == pytest.approx(round(value / step) * step if step else 0, abs=1e-6)


def test_every_family_runs_in_8_bits_and_rounds_all_matrices_but_those_that_route(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    before = logits(tiny_moe, tokens)
    routers = [layer.router for layer in find_moe_layers(tiny_moe)]
    routing = {id(p) for router in routers for p in router.parameters()}
    matrices = {
        name: parameter.detach().clone()
        for name, parameter in decoder_layers(tiny_moe).named_parameters()
        if parameter.dim() > 1 and id(parameter) not in routing and not name.endswith("bias")
        if "shared_expert_gate" not in name
    }
    placed = PlacedModel(tiny_moe, rounded=True)
    placed.place(CPU)
    found = dict(decoder_layers(tiny_moe).named_parameters())
    assert {n for n, p in found.items() if p.device == META} == matrices.keys()
    once = logits(tiny_moe, tokens)
    assert torch.equal(logits(tiny_moe, tokens), once)
    assert not torch.equal(once, before)
    assert divergence(before, once) < 0.01


def test_8_bits_are_offloaded_too(tokens: Tensor) -> None:
    here, there = build("gpt_oss"), build("gpt_oss")
    PlacedModel(here, rounded=True).place(CPU)
    PlacedModel(there, rounded=True, offload=True).place(CPU)
    assert torch.equal(logits(here, tokens), logits(there, tokens))


def test_a_pass_that_fails_leaves_no_layer_behind(tokens: Tensor) -> None:
    model = build("mixtral")
    placed = PlacedModel(model, rounded=True)
    placed.place(CPU)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    hook = find_moe_layers(model)[1].router.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        logits(model, tokens)
    hook.remove()
    assert {e.experts.down_proj.device for e in find_moe_layers(model)} == {META}


def test_the_shipped_model_keeps_its_distributions_in_a_third_of_the_memory() -> None:
    model = load(CHECKPOINT)
    tokens = TextDataModule(tokenizer=CHECKPOINT, valid_tokens=2048).windows("valid").input_ids
    before = logits(model, tokens)
    size = PlacedModel(model).num_bytes
    placed = PlacedModel(model, rounded=True)
    placed.place(CPU)
    assert placed.num_bytes < 0.33 * size
    assert divergence(before, logits(model, tokens)) < 1e-3


def divergence(wanted: Tensor, found: Tensor) -> float:
    pair = (log_softmax(found, -1), log_softmax(wanted, -1))
    return float(kl_div(*pair, reduction="none", log_target=True).sum(-1).mean())
