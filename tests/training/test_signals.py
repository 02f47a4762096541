"""What is recorded of layers is what they did, with gradients, and at counted positions alone."""

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.models.head import final_states
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.training.signals import LayerRecorder, LayerSignals, Signal
from tests.families import build
from tests.models.sharing import share

ALL: frozenset[Signal] = frozenset({"hidden", "branch", "router_logits", "expert_counts"})
SIGMOID = {"deepseek_v3", "glm4_moe", "minimax_m2"}


def counted(tokens: Tensor) -> Tensor:
    """Some positions of both rows."""
    chosen = torch.zeros_like(tokens, dtype=torch.bool)
    chosen[0, 2:7] = True
    chosen[1, ::3] = True
    return chosen


def record(
    model: PreTrainedModel, tokens: Tensor, wanted: Collection[Signal] = ALL
) -> dict[str, LayerSignals]:
    """Signals of one pass."""
    recorder = LayerRecorder(model, find_moe_layers(model), wanted)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with recorder.recording(counted(tokens)) as signals:
        final_states(model, batch)
    return signals


def seen(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Copies of what passes through experts and routers, by name."""
    found: dict[str, Tensor] = {}
    hooks: list[Any] = []
    for layer in find_moe_layers(model):

        def note(_: Any, args: Any, kwargs: Any, output: Tensor, name: str = layer.name) -> None:
            found[name] = output.clone()
            found[name + ".rows"] = [*args, *kwargs.values()][1].clone()

        def logits(_: Any, __: Any, output: Any, layer: Any = layer) -> None:
            found[layer.name + ".logits"] = layer.router_logits(output).clone()

        hooks.append(layer.experts.register_forward_hook(note, with_kwargs=True))
        hooks.append(layer.router.register_forward_hook(logits))
    output = model(tokens, output_hidden_states=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    # The last of the hidden states stands behind the final norm.
    for index, states in enumerate(output.hidden_states[1:-1]):
        found[str(index)] = states
    return found


@torch.no_grad()
def test_what_is_recorded_is_what_layers_did(
    family: str, tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    wanted, chosen = seen(tiny_moe, tokens), counted(tokens)
    signals = record(tiny_moe, tokens)
    assert len(signals) == tiny_moe.config.num_hidden_layers
    layers = {layer.name: layer for layer in find_moe_layers(tiny_moe)}
    for name, found in signals.items():
        assert found.facts.moe == (name if name in layers else None)
        if str(found.facts.index) in wanted:
            hidden = wanted[str(found.facts.index)][chosen]
            torch.testing.assert_close(found["hidden"], hidden, rtol=0, atol=0)
        if name not in layers:
            assert name == f"decoder layer {found.facts.index}"
            assert found.recorded.keys() == {"hidden"}
            continue
        flat = chosen.flatten()
        torch.testing.assert_close(found["branch"], wanted[name].reshape(-1, 32)[flat])
        assert torch.equal(found["router_logits"], wanted[name + ".logits"][flat])
        counts = torch.bincount(wanted[name + ".rows"][flat].flatten(), minlength=12)
        assert torch.equal(found["expert_counts"], counts)
        assert found.score == ("sigmoid" if family in SIGMOID else "softmax")


@torch.no_grad()
def test_counts_are_of_experts_where_rows_share_them(tokens: Tensor) -> None:
    model = share(build("qwen3_moe"))
    rows = seen(model, tokens)
    for name, found in record(model, tokens).items():
        if found.facts.moe is None:
            continue
        layer = next(layer for layer in find_moe_layers(model) if layer.name == name)
        experts = layer.experts_of(rows[name + ".rows"][counted(tokens).flatten()])
        wanted = torch.bincount(experts.flatten(), minlength=layer.num_experts)
        assert torch.equal(found["expert_counts"], wanted)
        assert len(wanted) < 12


def test_only_what_is_wanted_is_recorded(tokens: Tensor) -> None:
    model = build("qwen2_moe")
    found = record(model, tokens, ["branch"])
    assert [signals.recorded.keys() for signals in found.values()] == [{"branch"}, {"branch"}]
    assert record(model, tokens, []) == {}
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(KeyError, match="hidden"):
        found["model.layers.0.mlp"]["hidden"]


def test_layers_are_listed_by_what_they_have() -> None:
    model = build("qwen2_moe")
    recorder = LayerRecorder(model, find_moe_layers(model), ALL)
    assert list(recorder.available({"hidden"})) == [0, 1, 2]
    assert list(recorder.available({"branch"})) == [0, 2]
    assert recorder.available({"router_logits"})[2] == "model.layers.2.mlp"


def gradients(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss of all that is recorded."""
    model.zero_grad()
    found = record(model, tokens)
    parts = [s[name] for s in found.values() for name in s.recorded if name != "expert_counts"]
    torch.stack([part.float().square().mean() for part in parts]).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_gradients_are_the_same_under_gradient_checkpointing(name: str, tokens: Tensor) -> None:
    model = build(name).train()
    wanted = gradients(model, tokens)
    assert any("experts" in parameter for parameter in wanted)
    model.activation_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, tokens)
    assert found.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient)
