"""Sums against a loop over tokens and experts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_smoe.calibration import statistics
from lightning_smoe.calibration.observer import RoutedTokens
from lightning_smoe.calibration.statistics import (
    add_all,
    add_routed,
    domain_of_positions,
    empty_sums,
)
from lightning_smoe.data.packing import TokenWindows
from lightning_smoe.functional.sums import ExpertSums
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from tests.calibration.batches import (
    CPU,
    DOMAINS,
    RELATIVE,
    assert_same_sums,
    gather,
    random_windows,
)
from tests.families import build


class Seen:
    """What a hook beside the package's saw of one layer: states, selection, weights."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        layer.experts.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states, indices, weights = (*args, *kwargs.values())
        self.calls.append((states, indices, weights))


def loop(seen: Seen, windows: TokenWindows) -> ExpertSums:
    """The sums, token by token and expert by expert, in float64."""
    layer = seen.layer
    sums = empty_sums(layer, len(DOMAINS), True, CPU)
    assert sums.output_sum is not None
    assert sums.output_gram is not None
    assert sums.output_cosine is not None
    down, down_bias = layer.weights().down_proj.double(), layer.weights().down_bias
    rows = {tensor.kind: tensor.rows.double() for tensor in layer.router_tensors}
    states, indices, weights = (torch.cat(parts) for parts in zip(*seen.calls, strict=True))
    is_token, length = windows.attention_mask.reshape(-1).bool(), windows.input_ids.shape[1]
    for token in is_token.nonzero().squeeze(1).tolist():
        domain = int(windows.domain[token // length])
        state = states[token]
        sums.num_tokens[domain] += 1
        outputs = []
        for expert in range(layer.num_experts):
            output = down[expert] @ layer.activations(state[None], expert)[0].double()
            outputs.append(output if down_bias is None else output + down_bias[expert].double())
        for place, expert in enumerate(indices[token].tolist()):
            weight, norm = weights[token, place].double(), outputs[expert].norm()
            sums.count[domain, expert] += 1
            sums.gate_sum[domain, expert] += weight
            sums.output_norm_sum[domain, expert] += norm
            sums.gated_norm_sum[domain, expert] += weight * norm
        logits = rows["weight"] @ state.double() + rows.get("bias", torch.zeros(()))
        for i in range(layer.num_experts):
            sums.logit_gram[domain, i] += logits[i] * logits
        for i, output in enumerate(outputs):
            sums.output_sum[domain, i] += output
            for j, other in enumerate(outputs):
                product = output @ other
                sums.output_gram[domain, i, j] += product
                sums.output_cosine[domain, i, j] += product / (output.norm() * other.norm())
    return sums


@torch.no_grad()
def test_sums_equal_a_loop_over_tokens_and_experts(tiny_moe: PreTrainedModel) -> None:
    windows = random_windows(5, length=5)
    seen = [Seen(layer) for layer in find_moe_layers(tiny_moe)]
    found = gather(tiny_moe, windows, batch_size=2)
    assert list(found.layers) == [s.layer.name for s in seen]
    for one in seen:
        sums = found.layers[one.layer.name]
        assert int(sums.num_tokens.sum()) == windows.num_tokens
        assert_same_sums(sums, loop(one, windows), RELATIVE)


def test_without_all_experts_the_sums_over_routed_tokens_are_the_same(
    tiny_moe: PreTrainedModel,
) -> None:
    windows = random_windows(5)
    routed, everything = gather(tiny_moe, windows, False), gather(tiny_moe, windows)
    assert everything.has_all_experts
    assert not routed.has_all_experts
    for name, sums in routed.layers.items():
        tensors = everything.layers[name].tensors()
        assert len(sums.tensors()) == 6
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in sums.tensors().items())


@torch.no_grad()
@pytest.mark.parametrize("block", [1, 12 * 32 * 3, 1 << 24])
def test_the_memory_bound_of_all_experts_does_not_change_the_sums(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = find_moe_layers(build("gpt_oss"))[0]
    states = torch.randn(10, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    tokens = RoutedTokens(
        states,
        torch.zeros(10, 12),
        torch.zeros(10, 4),
        torch.zeros(10, 4, dtype=torch.int64),
        torch.arange(10) % 2,
        None,
    )
    wanted = empty_sums(layer, 2, True, CPU)
    add_all(wanted, layer, tokens)
    monkeypatch.setattr(statistics, "_BLOCK_NUMBERS", block)
    sums = empty_sums(layer, 2, True, CPU)
    add_all(sums, layer, tokens)
    assert_same_sums(sums, wanted, RELATIVE)


def test_an_expert_without_output_has_no_direction() -> None:
    model = build("mixtral")
    layer = find_moe_layers(model)[0]
    with torch.no_grad():
        layer.weights().down_proj[3].zero_()
    cosine = gather(model, random_windows()).layers[layer.name].output_cosine
    assert cosine is not None
    assert not cosine[:, 3].any()
    assert not cosine.isnan().any()


def test_the_sums_of_outputs_need_outputs() -> None:
    model = build("mixtral")
    layer = find_moe_layers(model)[0]
    tokens = RoutedTokens(
        torch.zeros(1, 32),
        torch.zeros(1, 12),
        torch.zeros(1, 2),
        torch.zeros(1, 2, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        None,
    )
    sums = empty_sums(layer, 1, False, CPU)
    with pytest.raises(ValueError, match="observe with outputs"):
        add_routed(sums, tokens)
    with pytest.raises(ValueError, match="no room for the sums over all experts"):
        add_all(sums, layer, tokens)


def test_every_position_has_the_domain_of_its_sequence() -> None:
    assert domain_of_positions(torch.tensor([1, 0]), 3).tolist() == [1, 1, 1, 0, 0, 0]


def test_reducing_applies_to_every_sum() -> None:
    found = gather(build("mixtral"), random_windows())
    doubled = found.reduced(lambda tensor: 2 * tensor)
    for name, sums in found.layers.items():
        tensors = doubled.layers[name].tensors()
        assert all(torch.equal(tensors[k], 2 * t) for k, t in sums.tensors().items())
