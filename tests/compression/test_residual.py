"""What a block's output does to the residual stream, and what it should do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.compression.residual import output_factor, output_wanted
from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.walk import decoder_layers, embed, run_layer
from tests.calibration.batches import num_hooks, random_windows
from tests.families import build

MULTIPLIER = 0.22


@torch.no_grad()
def first_layer(model: PreTrainedModel) -> tuple[MoELayer, Tensor, Callable[[], Tensor]]:
    """The first block, which positions are tokens, and a run of its decoder layer."""
    layer, windows = find_moe_layers(model)[0], random_windows()
    mask = windows.attention_mask
    batch = embed(model, windows.tensors(), mask.bool())
    decoder = decoder_layers(model)[layer.index]
    return layer, mask.bool(), lambda: run_layer(decoder, batch, layer.index)


def granite() -> PreTrainedModel:
    """A model that multiplies what its layers add."""
    model = build("granitemoe")
    decoder: Any
    for decoder in decoder_layers(model):
        decoder.residual_multiplier = MULTIPLIER
    return model


def test_ordinary_families_add_the_output_as_it_is(family: str) -> None:
    layer, is_token, run = first_layer(build(family))
    assert output_factor(layer, is_token, run) == 1.0


def test_the_multiplier_of_granite_is_found() -> None:
    layer, is_token, run = first_layer(granite())
    assert output_factor(layer, is_token, run) == pytest.approx(MULTIPLIER, rel=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_bfloat16_layers_are_understood(family: str) -> None:
    layer, is_token, run = first_layer(build(family).bfloat16())
    assert output_factor(layer, is_token, run) == 1.0


@pytest.mark.parametrize(
    "change",
    [
        lambda states: torch.nn.functional.layer_norm(states, states.shape[-1:]),
        lambda states: states * states.norm(dim=-1, keepdim=True),
        lambda states: states.tanh(),
    ],
    ids=["norm", "product", "tanh"],
)
def test_a_layer_that_does_more_than_to_add_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    layer, is_token, run = first_layer(build("mixtral"))
    with pytest.raises(InputError, match=rf"{layer.name}: .* does more .* set .*correct_drift to"):
        output_factor(layer, is_token, lambda: change(run()))


def test_no_hook_is_left_and_nothing_changes_also_when_the_run_fails() -> None:
    model = build("qwen2_moe")
    layer, is_token, run = first_layer(model)
    before, hooks = run(), num_hooks(model)
    output_factor(layer, is_token, run)
    assert torch.equal(run(), before)
    runs: list[None] = []

    def fail_at_last() -> Tensor:
        runs.append(None)
        if len(runs) > 1:
            raise RuntimeError("out of memory")
        return run()

    with pytest.raises(RuntimeError, match="out of memory"):
        output_factor(layer, is_token, fail_at_last)
    assert num_hooks(model) == hooks


def test_a_batch_without_any_token_tells_nothing() -> None:
    layer, is_token, run = first_layer(granite())
    assert output_factor(layer, torch.zeros_like(is_token), run) == 1.0


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [granite, lambda: build("deepseek_v3")], ids=["granite", "deepseek"]
)
def test_the_wanted_output_takes_the_states_to_the_teachers(
    make: Callable[[], PreTrainedModel],
) -> None:
    layer, is_token, run = first_layer(make())
    factor = output_factor(layer, is_token, run)
    outputs: list[Tensor] = []

    def note(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        first = output[0] if isinstance(output, tuple) else output
        outputs.append(first.view(*is_token.shape, -1)[is_token])

    hook = layer.block.register_forward_hook(note)
    states = run()[is_token]
    hook.remove()
    teacher = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    wanted = output_wanted(teacher, states, outputs[0], factor)

    def swap(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> object:
        first = output[0] if isinstance(output, tuple) else output
        other = first.clone()
        other.view(*is_token.shape, -1)[is_token] = wanted
        return (other, *output[1:]) if isinstance(output, tuple) else other

    layer.block.register_forward_hook(swap)
    torch.testing.assert_close(run()[is_token], teacher, rtol=0, atol=1e-4)
