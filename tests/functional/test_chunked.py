"""A loss in chunks has the gradients of the whole, and never the memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_smoe.functional.chunked import ChunkLoss, chunk_size_of, chunked, chunks

TOKENS, HIDDEN, VOCAB = 13, 5, 40


class Case:
    """Random states, a head with a bias, targets, and their cross-entropy."""

    def __init__(self, dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> None:
        draw = torch.Generator().manual_seed(0)
        self.states = torch.randn(tokens, HIDDEN, generator=draw, dtype=dtype).requires_grad_()
        self.weight = torch.randn(VOCAB, HIDDEN, generator=draw, dtype=dtype).requires_grad_()
        self.bias = torch.randn(VOCAB, generator=draw, dtype=dtype).requires_grad_()
        self.targets = torch.randint(VOCAB, (tokens,), generator=draw)

    def loss(self, states: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        logits = torch.nn.functional.linear(states, self.weight, self.bias).float()
        if states.dtype == torch.float64:
            logits = states @ self.weight.T + self.bias
        values = torch.nn.functional.cross_entropy(logits, self.targets[rows], reduction="none")
        sums = torch.stack([values.sum(), values.square().sum()]).detach().double()
        return values.sum(), sums

    def sources(self) -> list[Tensor]:
        return [self.states, self.weight, self.bias]

    def run(self, chunk_size: int) -> tuple[Tensor, Tensor]:
        return chunked(self.loss, self.states, [self.weight, self.bias], chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100])
def test_sums_and_gradients_are_those_of_the_whole(chunk_size: int) -> None:
    case = Case()
    wanted, wanted_sums = case.loss(case.states, slice(0, TOKENS))
    total, sums = case.run(chunk_size)
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums, wanted_sums, rtol=1e-12, atol=1e-12)
    assert total.requires_grad
    assert not sums.requires_grad
    # What comes in from behind scales the gradients.
    gradients = torch.autograd.grad(total / 7, case.sources())
    for found, expected in zip(
        gradients, torch.autograd.grad(wanted / 7, case.sources()), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_weight_that_is_used_elsewhere_too_gets_both_gradients() -> None:
    case = Case()
    states = torch.tanh(case.weight[:TOKENS] * 0.3)
    total, _ = chunked(case.loss, states, [case.weight, case.bias], 4)
    wanted, _ = case.loss(states, slice(0, TOKENS))
    (found,) = torch.autograd.grad(total, case.weight, retain_graph=True)
    (expected,) = torch.autograd.grad(wanted, case.weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["states", "weight", "all"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    case = Case()
    for name in ("states", "weight", "bias"):
        getattr(case, name).requires_grad_(frozen not in {name, "all"})
    total, _ = case.run(4)
    assert total.requires_grad == (frozen != "all")
    if frozen != "all":
        total.backward()
    for name in ("states", "weight", "bias"):
        assert (getattr(case, name).grad is None) == (frozen in {name, "all"})


def test_a_parameter_that_the_loss_does_not_read_gets_zeros() -> None:
    case, other = Case(), torch.ones(3, requires_grad=True)
    total, _ = chunked(case.loss, case.states, [case.weight, other, case.bias], 4)
    total.backward()
    assert torch.equal(other.grad, torch.zeros(3))  # type: ignore[arg-type]  # there is one


def test_without_gradients_there_are_sums_alone() -> None:
    case = Case()
    with torch.no_grad():
        total, sums = case.run(4)
    assert not total.requires_grad
    torch.testing.assert_close(sums, case.run(5)[1], rtol=1e-12, atol=1e-12)


def test_no_tokens_give_gradients_of_zero() -> None:
    case = Case(tokens=0)
    total, sums = case.run(4)
    assert total == 0
    assert sums.tolist() == [0, 0]
    total.backward()
    assert all(not source.grad.any() for source in case.sources())  # type: ignore[union-attr]


def test_gradients_under_autocast_are_those_of_autocast() -> None:
    case = Case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = case.run(4)
        wanted, _ = case.loss(case.states, slice(0, TOKENS))
    found = torch.autograd.grad(total, case.sources())
    for one, other in zip(found, torch.autograd.grad(wanted, case.sources()), strict=True):
        assert one.dtype == torch.float32
        # Sums of chunks are rounded to bfloat16 each.
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_half_precision_gradients_are_summed_in_float32() -> None:
    case, wide = Case(torch.bfloat16), Case(torch.float32)
    wide.targets = case.targets
    for narrow, source in zip(case.sources(), wide.sources(), strict=True):
        source.data.copy_(narrow)
    found = torch.autograd.grad(case.run(1)[0], case.sources())
    wanted = torch.autograd.grad(wide.run(1)[0], wide.sources())
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=0.03, atol=0.03)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        for found in output if isinstance(output, tuple | list) else [output]:
            if isinstance(found, Tensor):
                self.count = max(self.count, found.numel())
        return output


@pytest.mark.parametrize("chunk_size", [5, 8])
def test_nothing_is_larger_than_the_logits_of_a_chunk(chunk_size: int) -> None:
    case = Case()
    with Largest() as largest:
        total, _ = case.run(chunk_size)
        total.backward()
    assert largest.count == chunk_size * VOCAB
    assert chunk_size * VOCAB < TOKENS * VOCAB


def test_chunks_cover_all_tokens_once() -> None:
    assert list(chunks(10, 4)) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert list(chunks(8, 4)) == [slice(0, 4), slice(4, 8)]
    assert list(chunks(0, 4)) == [slice(0, 0)]


def test_a_chunk_of_logits_fills_128_megabytes_at_most() -> None:
    assert chunk_size_of(4096) == 8192
    assert 0.99 * 2**27 < chunk_size_of(151936) * 151936 * 4 <= 2**27
    assert chunk_size_of(2**30) == 1


def test_the_loss_is_called_once_a_chunk() -> None:
    case, called = Case(), []

    def loss(states: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        called.append(rows)
        return case.loss(states, rows)

    typed: ChunkLoss = loss
    total, _ = chunked(typed, case.states, [case.weight, case.bias], 5)
    total.backward()
    assert called == [slice(0, 5), slice(5, 10), slice(10, 13)]
