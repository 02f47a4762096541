"""Walking a model layer by layer gives what its own forward gives, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_smoe.models.walk import decoder_layers, embed, run_layer
from tests.families import PAD_TOKEN_ID, build


@pytest.fixture
def padded(tokens: Tensor) -> dict[str, Tensor]:
    """The second sequence is five tokens shorter than the first."""
    mask = torch.ones_like(tokens)
    mask[1, -5:] = 0
    return {
        "input_ids": tokens.masked_fill(mask == 0, PAD_TOKEN_ID),
        "attention_mask": mask,
    }


def layer_outputs(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """What the model's own forward has behind every decoder layer, and its logits."""
    outputs: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(note) for layer in decoder_layers(model)]
    with torch.no_grad():
        logits: Tensor = model(**batch, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return outputs, logits


def test_every_layer_of_a_padded_batch_gives_the_states_of_the_models_own_forward(
    tiny_moe: PreTrainedModel, padded: dict[str, Tensor]
) -> None:
    expected, _ = layer_outputs(tiny_moe, padded)
    batch = embed(tiny_moe, padded, is_token=padded["attention_mask"].bool())
    for index, layer in enumerate(decoder_layers(tiny_moe)):
        batch.states = run_layer(layer, batch, index)
        torch.testing.assert_close(batch.states, expected[index], rtol=0, atol=0)
    assert len(expected) == len(batch.calls) == tiny_moe.config.num_hidden_layers


def test_the_states_that_wait_are_the_first_layers_input(
    tiny_moe: PreTrainedModel, padded: dict[str, Tensor]
) -> None:
    seen: list[Tensor] = []
    hook = decoder_layers(tiny_moe)[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        tiny_moe(**padded)
    hook.remove()
    is_token = padded["attention_mask"].bool()
    batch = embed(tiny_moe, padded, is_token=is_token)
    torch.testing.assert_close(batch.states, seen[0], rtol=0, atol=0)
    assert batch.is_token is is_token


def test_the_models_forward_is_restored(
    tiny_moe: PreTrainedModel, padded: dict[str, Tensor]
) -> None:
    _, before = layer_outputs(tiny_moe, padded)
    embed(tiny_moe, padded, is_token=padded["attention_mask"].bool())
    assert not any("forward" in vars(layer) for layer in decoder_layers(tiny_moe))
    _, after = layer_outputs(tiny_moe, padded)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_the_models_forward_is_restored_when_it_fails(padded: dict[str, Tensor]) -> None:
    model = build("qwen3_moe")
    padded["input_ids"][0, 0] = 10**6
    with pytest.raises(IndexError, match="out of range"):
        embed(model, padded, is_token=padded["attention_mask"].bool())
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))


def test_a_walk_records_no_gradients(padded: dict[str, Tensor]) -> None:
    model = build("mixtral")
    batch = embed(model, padded, is_token=padded["attention_mask"].bool())
    assert not batch.states.requires_grad
    assert not run_layer(decoder_layers(model)[0], batch, 0).requires_grad


def test_the_walk_finds_the_list_of_all_decoder_layers_dense_ones_too(
    tiny_moe: PreTrainedModel,
) -> None:
    assert decoder_layers(tiny_moe) is tiny_moe.base_model.layers
