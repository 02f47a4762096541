"""Sums against a loop over tokens and experts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_smoe.calibration.observer import RoutedTokens
from lightning_smoe.calibration.statistics import (
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
    sums = empty_sums(layer, len(DOMAINS), CPU)
    down, down_bias = layer.weights().down_proj.double(), layer.weights().down_bias
    rows = {tensor.kind: tensor.rows.double() for tensor in layer.router_tensors}
    states, indices, weights = (torch.cat(parts) for parts in zip(*seen.calls, strict=True))
    is_token, length = windows.attention_mask.reshape(-1).bool(), windows.input_ids.shape[1]
    for token in is_token.nonzero().squeeze(1).tolist():
        domain = int(windows.domain[token // length])
        state = states[token]
        sums.num_tokens[domain] += 1
        for place, expert in enumerate(indices[token].tolist()):
            output = down[expert] @ layer.activations(state[None], expert)[0].double()
            if down_bias is not None:
                output = output + down_bias[expert].double()
            weight, norm = weights[token, place].double(), output.norm()
            sums.count[domain, expert] += 1
            sums.gate_sum[domain, expert] += weight
            sums.output_norm_sum[domain, expert] += norm
            sums.gated_norm_sum[domain, expert] += weight * norm
            sums.output_energy_sum[domain, expert] += norm**2
            sums.gated_energy_sum[domain, expert] += (weight * norm) ** 2
            sums.output_sum[domain, expert] += output
            largest = max(float(sums.output_max[domain, expert]), float(output.abs().max()))
            sums.output_max[domain, expert] = largest
        logits = rows["weight"] @ state.double() + rows.get("bias", torch.zeros(()))
        for i in range(layer.num_experts):
            sums.logit_gram[domain, i] += logits[i] * logits
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
    sums = empty_sums(layer, 1, CPU)
    with pytest.raises(ValueError, match="observe with outputs"):
        add_routed(sums, tokens)


def test_every_position_has_the_domain_of_its_sequence() -> None:
    assert domain_of_positions(torch.tensor([1, 0]), 3).tolist() == [1, 1, 1, 0, 0, 0]


def test_reducing_adds_up_every_sum_and_takes_the_largest_of_maxima() -> None:
    found = gather(build("mixtral"), random_windows(3))
    asked: list[str] = []

    def reduce(tensor: Tensor, how: str) -> Tensor:
        asked.append(how)
        return 2 * tensor if how == "sum" else tensor

    doubled = found.reduced(0, reduce)
    for name, sums in found.layers.items():
        tensors = doubled.layers[name].tensors()
        for key, tensor in sums.tensors().items():
            factor = 1 if key == "output_max" else 2
            assert torch.equal(tensors[key], factor * tensor)


def test_the_largest_output_of_all_domains_is_the_largest_of_each() -> None:
    sums = gather(build("mixtral"), random_windows()).layers["model.layers.0.mlp"]
    largest = sums.output_max
    for expert in range(12):
        wanted = max(float(largest[domain, expert]) for domain in range(len(DOMAINS)))
        assert float(sums.pooled().output_max[expert]) == wanted
    assert not torch.equal(largest[0], largest[1])


def test_an_expert_that_no_token_visits_has_sums_of_zero() -> None:
    model = build("deepseek_v3")
    layer = find_moe_layers(model)[0]
    with torch.no_grad():
        for tensor in layer.router_tensors:
            if tensor.kind == "selection":
                tensor.rows[3] = -100.0
    sums = gather(model, random_windows()).layers[layer.name]
    for key, found in sums.tensors().items():
        if key not in ("num_tokens", "logit_gram"):
            assert not found[:, 3].any(), key
            assert found.isfinite().all(), key
