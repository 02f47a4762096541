"""The sample of tokens: which they are, and that they are what the layer really did."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_smoe.calibration.observer import RoutedTokens
from lightning_smoe.calibration.sample import (
    field_names,
    gathered,
    is_sampled,
    joined,
    take,
)
from lightning_smoe.functional.evidence import TokenSample
from lightning_smoe.models.layer import find_moe_layers
from tests.calibration.batches import assert_same_sample, gather, random_windows
from tests.families import build


def numbered(first: int, count: int) -> TokenSample:
    """A sample whose every number tells the token that it belongs to."""
    number = torch.arange(first, first + count)[:, None]
    wide = number.float()
    return TokenSample(
        wide.expand(-1, 3), wide.expand(-1, 4), wide.expand(-1, 2), number.expand(-1, 2)
    )


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
def test_one_position_of_so_many_is_sampled_and_sequences_differ(stride: int) -> None:
    document = torch.tensor([[4, 4, 4, 5, 5], [5, 6, 6, 6, 6]])
    found = is_sampled(document, stride)
    for row in range(2):
        for position in range(5):
            wanted = (position + int(document[row, 0])) % stride == 0
            assert bool(found[row, position]) == wanted
    assert stride == 1 or not torch.equal(found[0], found[1])


def test_taking_copies_the_tokens_and_widens_their_numbers() -> None:
    states = torch.arange(12.0).view(4, 3).bfloat16()
    logits = torch.arange(20.0).view(4, 5).bfloat16()
    gates = torch.full((4, 2), 0.5).bfloat16()
    indices = torch.arange(8).view(4, 2).int() % 5
    domain = torch.zeros(4, dtype=torch.int64)
    sample = take(
        RoutedTokens(states, logits, gates, indices, domain, None),
        torch.tensor([False, True, False, True]),
    )
    assert sample.states.tolist() == [[3, 4, 5], [9, 10, 11]]
    assert sample.expert_indices.tolist() == [[2, 3], [1, 2]]
    assert [getattr(sample, name).dtype for name in field_names()] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.int64,
    ]
    states.zero_()
    assert sample.states.any()


def test_samples_are_joined_in_order() -> None:
    whole = joined([numbered(0, 2), numbered(2, 0), numbered(2, 3)])
    for name in field_names():
        assert torch.equal(getattr(whole, name), getattr(numbered(0, 5), name))


@pytest.mark.parametrize("sizes", [(3,), (2, 4), (0, 3), (3, 0, 1), (0, 0)], ids=str)
def test_samples_of_all_processes_are_put_together_in_order_of_rank(sizes: tuple[int, ...]) -> None:
    # A thread stands for a process; all wait for each other at every reduction.
    meeting, tensors = Barrier(len(sizes), timeout=10), [torch.zeros(0)] * len(sizes)

    def run(rank: int) -> TokenSample:
        def reduce(tensor: Tensor, how: str) -> Tensor:
            tensors[rank] = tensor
            meeting.wait()
            every = torch.stack(tensors)
            meeting.wait()
            return every.amax(0) if how == "max" else every.sum(0)

        return gathered(numbered(10 + sum(sizes[:rank]), sizes[rank]), rank, reduce)

    with ThreadPoolExecutor(len(sizes)) as pool:
        results = list(pool.map(run, range(len(sizes))))
    wanted = numbered(10, sum(sizes))
    for result in results:
        for name in field_names():
            assert torch.equal(getattr(result, name), getattr(wanted, name)), name


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 3])
def test_the_sample_is_what_a_hook_sees(tiny_moe: PreTrainedModel, stride: int) -> None:
    layers = find_moe_layers(tiny_moe)
    calls: dict[nn.Module, list[tuple[Tensor, ...]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, []).append((*args, *kwargs.values()))

    for layer in layers:
        layer.experts.register_forward_pre_hook(note, with_kwargs=True)
    windows = random_windows(6)
    found = gather(tiny_moe, windows, batch_size=6, stride=stride)
    assert list(found.samples) == [layer.name for layer in layers]
    for layer in layers:
        sample = found.samples[layer.name]
        (states, indices, weights), *others = calls[layer.experts]
        assert not others
        place = 0
        for row in range(6):
            for position in range(9):
                token = 9 * row + position
                first = int(windows.document[row, 0])
                if not windows.attention_mask[row, position] or (position + first) % stride:
                    continue
                assert torch.equal(sample.states[place], states[token])
                gates = torch.zeros(layer.num_experts)
                gates[indices[token]] = weights[token].float()
                assert torch.equal(sample.gates[place], gates)
                place += 1
        assert place == sample.num_tokens


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_the_sample_does_not_depend_on_batches_or_order(family: str, stride: int) -> None:
    model, windows = build(family), random_windows()
    wanted = gather(model, windows, stride=stride).samples
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    others = (
        gather(model, windows, batch_size=1, stride=stride),
        gather(model, windows.select(order), batch_size=5, stride=stride),
    )
    for name, sample in wanted.items():
        for other in others:
            assert_same_sample(other.samples[name], sample)


def test_every_layer_samples_the_same_tokens() -> None:
    samples = gather(build("qwen2_moe"), random_windows(), stride=3).samples.values()
    sizes = {sample.num_tokens for sample in samples}
    windows = random_windows()
    sampled = is_sampled(windows.document, 3) & windows.attention_mask.bool()
    assert sizes == {int(sampled.sum())}


def test_a_batch_without_any_sampled_token_is_no_trouble() -> None:
    windows = random_windows(3)
    samples = gather(build("mixtral"), windows, batch_size=1, stride=1000).samples
    # The first sequence is of document 0, whose first position is the only one that counts.
    assert {sample.num_tokens for sample in samples.values()} == {1}
