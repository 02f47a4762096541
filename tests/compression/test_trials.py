"""Layers tried with fewer experts give what compressing them would, and nothing is changed."""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.compression.apply import apply_plan
from lightning_smoe.compression.planner import make_plan
from lightning_smoe.compression.recipe import Recipe
from lightning_smoe.compression.trials import Trials
from lightning_smoe.errors import InputError
from lightning_smoe.functional.divergence import kl_divergence
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from tests.calibration.batches import random_windows
from tests.compression.trial_models import FAMILIES, MERGE, POOL, PRUNE, known, trials_of

ALL = 10_000


def compressed(family: str, recipe: Recipe, counts: Mapping[str, int]) -> PreTrainedModel:
    model, statistics = known(family)
    model = copy.deepcopy(model)
    layers = [layer for layer in find_moe_layers(model) if layer.name in counts]
    apply_plan(model, make_plan(statistics, layers, recipe, counts), statistics.samples)
    return model


@torch.no_grad()
def divergence_by_sequence(teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    """Mean over tokens that another follows, one sequence at a time and without its padding."""
    windows, total, number = random_windows(), 0.0, 0
    for ids, mask in zip(windows.input_ids, windows.attention_mask, strict=True):
        tokens = ids[mask.bool()][None]
        values = kl_divergence(teacher(tokens).logits[:, :-1], student(tokens).logits[:, :-1])
        total, number = total + float(values.sum()), number + values.numel()
    return total / number


@pytest.mark.parametrize("recipe", [PRUNE, POOL])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_measured_model_is_the_compressed_one(family: str, recipe: Recipe) -> None:
    trials = trials_of(family, recipe)
    measure = trials.measure(ALL)
    first, last = (layer.name for layer in trials.layers)
    for counts in ({first: 8, last: 10}, {last: 8}, {first: 8, last: 12}):
        model = compressed(family, recipe, counts)
        wanted = divergence_by_sequence(known(family)[0], model)
        assert measure(counts) == pytest.approx(wanted, rel=1e-4)
        assert measure(counts) == measure(counts)


def test_keeping_all_costs_nothing() -> None:
    trials = trials_of("mixtral")
    assert trials.measure(ALL)({layer.name: 12 for layer in trials.layers}) == 0
    assert trials.layer_errors(trials.layers[0], [12]) == [0]


@pytest.mark.parametrize("recipe", [PRUNE, POOL, MERGE])
@pytest.mark.parametrize("family", FAMILIES)
def test_trials_change_nothing(family: str, recipe: Recipe) -> None:
    model, _ = known(family)
    before, blocks = copy.deepcopy(model.state_dict()), [x.block for x in find_moe_layers(model)]
    trials = trials_of(family, recipe)
    trials.layer_errors(trials.layers[0], [8])
    assert trials.measure(ALL)({layer.name: 8 for layer in trials.layers}) > 0
    assert [layer.block for layer in find_moe_layers(model)] == blocks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_original_is_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = trials_of("mixtral")
    measure = trials.measure(ALL)
    blocks = [layer.block for layer in find_moe_layers(known("mixtral")[0])]

    def fail(*_: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("lightning_smoe.compression.trials.kl_divergence", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure({layer.name: 8 for layer in trials.layers})
    assert [layer.block for layer in find_moe_layers(known("mixtral")[0])] == blocks


def routed_by_hand(layer: MoELayer, states: Tensor) -> Tensor:
    """What mixtral's experts add up to, token by token."""
    rows, weights = layer.router_tensors[0].rows, layer.weights()
    output = torch.zeros_like(states)
    for token, state in enumerate(states):
        gates, experts = (rows @ state).softmax(0).topk(layer.top_k)
        for gate, expert in zip(gates / gates.sum(), experts.tolist(), strict=True):
            output[token] += gate * weights.outputs(state[None], expert, layer.activate)[0]
    return output


@torch.no_grad()
def test_a_layer_error_is_that_of_its_routed_output() -> None:
    trials = trials_of("mixtral")
    layer = trials.layers[1]
    states = known("mixtral")[1].samples[layer.name].states
    wanted = routed_by_hand(layer, states)
    for count in (3, 8):
        model = compressed("mixtral", PRUNE, {layer.name: count})
        found = routed_by_hand(find_moe_layers(model)[1], states)
        error = float((found - wanted).square().sum())
        share = error / float(wanted.square().sum())
        assert trials.layer_errors(layer, [12, count]) == pytest.approx([0, share], rel=1e-4)
        mean = trials.layer_errors(layer, [12, count], relative=False)
        assert mean == pytest.approx([0, error / len(states)], rel=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("recipe", [PRUNE, POOL, MERGE])
def test_layers_of_every_kind_have_errors(family: str, recipe: Recipe) -> None:
    trials = trials_of(family, recipe)
    for layer in trials.layers:
        fewer, all_there = trials.layer_errors(layer, [8, 12])
        assert 0 < fewer < 2
        assert all_there == 0


def test_fewer_tokens_are_the_first_sequences() -> None:
    trials, windows = trials_of("mixtral"), random_windows()
    counts = {layer.name: 6 for layer in trials.layers}
    text = {name: tensor[:3] for name, tensor in windows.tensors().items()}
    model, statistics = known("mixtral")
    few = Trials(model, statistics, PRUNE, layers=trials.layers, keep=6, text=text, batch_size=4)
    assert trials.measure(3 * 9 + 8)(counts) == few.measure(ALL)(counts)


def test_text_of_single_tokens_is_refused() -> None:
    model, statistics = known("mixtral")
    text = {"input_ids": torch.full((3, 4), 7), "attention_mask": torch.eye(4)[:3].long()}
    trials = Trials(
        model, statistics, PRUNE, layers=find_moe_layers(model), keep=6, text=text, batch_size=4
    )
    with pytest.raises(InputError, match=r"no token that follows another.*give longer text"):
        trials.measure(ALL)
