"""Watching the experts: what is handed over, and that nothing else changes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.calibration.observer import Batch, RoutedTokens, observing
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from tests.calibration.batches import num_hooks
from tests.families import build

Consumer = Callable[[MoELayer, RoutedTokens], None]
# The weighted sum over the selected experts is formed in another order than the model's.
ROUNDING = 1e-5


def whole(tokens: Tensor) -> Batch:
    """Every position counts; sequences are domains."""
    domain = torch.arange(len(tokens)).repeat_interleave(tokens.shape[1])
    return Batch(torch.ones(tokens.numel(), dtype=torch.bool), domain)


def ignore(layer: MoELayer, tokens: RoutedTokens) -> None:
    """Takes no notice."""


@torch.no_grad()
def observed(
    model: PreTrainedModel, tokens: Tensor, batch: Batch, with_outputs: bool = True
) -> dict[str, RoutedTokens]:
    """What each layer of a model handed over, by name."""
    found: dict[str, RoutedTokens] = {}

    def note(layer: MoELayer, routed: RoutedTokens) -> None:
        assert layer.name not in found
        found[layer.name] = routed

    with observing(find_moe_layers(model), lambda: batch, note, with_outputs):
        model(tokens)
    return found


@torch.no_grad()
def test_watching_the_router_changes_no_bit_of_the_logits(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    before = tiny_moe(tokens).logits
    with observing(find_moe_layers(tiny_moe), lambda: whole(tokens), ignore):
        after = tiny_moe(tokens).logits
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@torch.no_grad()
def test_watching_the_outputs_gives_the_logits_of_the_model(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    before = tiny_moe(tokens).logits
    with observing(find_moe_layers(tiny_moe), lambda: whole(tokens), ignore, with_outputs=True):
        after = tiny_moe(tokens).logits
    torch.testing.assert_close(after, before, rtol=ROUNDING, atol=ROUNDING)


@torch.no_grad()
def test_bfloat16_stays_bfloat16_under_watch(tiny_moe: PreTrainedModel, tokens: Tensor) -> None:
    tiny_moe.bfloat16()
    before = tiny_moe(tokens).logits
    with observing(find_moe_layers(tiny_moe), lambda: whole(tokens), ignore, with_outputs=True):
        after = tiny_moe(tokens).logits
    assert after.dtype == torch.bfloat16
    error = (after - before).float().norm() / before.float().norm()
    assert error < 0.05


@torch.no_grad()
def test_what_is_handed_over_is_what_the_router_and_its_experts_did(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    layers = find_moe_layers(tiny_moe)
    for layer in layers:
        routed = observed(tiny_moe, tokens, whole(tokens))[layer.name]
        rows = {tensor.kind: tensor.rows for tensor in layer.router_tensors}
        logits = torch.nn.functional.linear(routed.states, rows["weight"], rows.get("bias"))
        torch.testing.assert_close(routed.router_logits, logits, rtol=ROUNDING, atol=ROUNDING)
        assert routed.outputs is not None
        assert routed.expert_indices.shape == (tokens.numel(), layer.top_k)
        for token in range(0, tokens.numel(), 5):
            for place, expert in enumerate(routed.expert_indices[token].tolist()):
                state = routed.states[token : token + 1]
                output = layer.experts(state, torch.tensor([[expert]]), torch.ones(1, 1))[0]
                torch.testing.assert_close(
                    routed.outputs[token, place], output, rtol=ROUNDING, atol=ROUNDING
                )


@torch.no_grad()
def test_router_rows_that_share_an_expert_are_handed_over_as_that_expert(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    full = observed(tiny_moe, tokens, whole(tokens))
    layer = find_moe_layers(tiny_moe)[0]
    half = torch.arange(layer.num_experts) // 2
    # The first row of a pair keeps its expert, the second gets it too.
    layer.share(layer.weights().select(torch.arange(0, layer.num_experts, 2)), half)
    before, after = full[layer.name], observed(tiny_moe, tokens, whole(tokens))[layer.name]
    for field in ("states", "router_logits", "routing_weights"):
        assert torch.equal(getattr(after, field), getattr(before, field))
    assert torch.equal(after.expert_indices, half[before.expert_indices])
    in_order = after.expert_indices.sort(1).values
    assert bool((in_order[:, 1:] == in_order[:, :-1]).any())
    assert before.outputs is not None
    assert after.outputs is not None
    kept = before.expert_indices % 2 == 0
    torch.testing.assert_close(
        after.outputs[kept], before.outputs[kept], rtol=ROUNDING, atol=ROUNDING
    )


def test_outputs_are_handed_over_only_when_they_are_asked_for(tokens: Tensor) -> None:
    model = build("mixtral")
    without = observed(model, tokens, whole(tokens), with_outputs=False)
    with_outputs = observed(model, tokens, whole(tokens))
    # The first layer's inputs do not depend on how the experts ran.
    first = find_moe_layers(model)[0].name
    assert all(routed.outputs is None for routed in without.values())
    assert torch.equal(without[first].routing_weights, with_outputs[first].routing_weights)
    assert torch.equal(without[first].expert_indices, with_outputs[first].expert_indices)


def test_positions_that_are_no_tokens_are_left_out(tokens: Tensor) -> None:
    model = build("qwen2_moe")
    batch = whole(tokens)
    everything = observed(model, tokens, batch)
    real = torch.rand(tokens.numel(), generator=torch.Generator().manual_seed(0)) < 0.5
    some = observed(model, tokens, Batch(real, batch.domain))
    for name, routed in some.items():
        for field in ("states", "router_logits", "routing_weights", "expert_indices", "domain"):
            assert torch.equal(getattr(routed, field), getattr(everything[name], field)[real])


def test_a_batch_without_any_token_hands_over_nothing(tokens: Tensor) -> None:
    nothing = torch.zeros(tokens.numel(), dtype=torch.bool)
    found = observed(build("mixtral"), tokens, Batch(nothing, whole(tokens).domain))
    assert [len(routed.states) for routed in found.values()] == [0, 0]


def fail(layer: MoELayer, tokens: RoutedTokens) -> None:
    """Cannot cope."""
    raise RuntimeError("the consumer failed")


@pytest.mark.parametrize("with_outputs", [False, True])
def test_no_hook_is_left_behind_also_when_something_fails(
    tokens: Tensor, with_outputs: bool
) -> None:
    model = build("qwen2_moe")
    before = num_hooks(model)
    observed(model, tokens, whole(tokens), with_outputs)
    assert num_hooks(model) == before
    layers = find_moe_layers(model)
    with observing(layers, lambda: whole(tokens), fail, with_outputs):
        assert num_hooks(model) > before
        with pytest.raises(RuntimeError, match="the consumer failed"):
            model(tokens)
    assert num_hooks(model) == before
