"""The conjugate gradients of fits with a matrix a token, beyond what router fits show."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.curved_ridge import CurvedBatch, curved_ridge

START = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def batch_of(num_tokens: int, *, coupled: bool, seed: int = 1) -> CurvedBatch:
    """Random tokens whose features differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    features, missing = (
        torch.randn(num_tokens, width, generator=generator, dtype=torch.float64) for width in (6, 4)
    )
    sizes = torch.tensor([1e-2, 1e-1, 1.0, 1.0, 10.0, 1e2])
    weights = torch.randn(num_tokens, 4, generator=generator, dtype=torch.float64).softmax(1)
    return CurvedBatch(features * sizes, missing, weights, coupled)


def fit(batches: list[CurvedBatch], strength: float = 0.01, num_steps: int = 100) -> Tensor:
    return curved_ridge(START, batches, strength, num_steps=num_steps, reduce=lambda t: t)


def dense(batch: CurvedBatch, strength: float = 0.01) -> Tensor:
    """The same by one dense system of equations."""
    system, right = torch.zeros(24, 24).double(), torch.zeros(24).double()
    for x, r, w in zip(batch.features, batch.missing, batch.weights, strict=True):
        matrix = w.diag() - torch.outer(w, w) if batch.coupled else w.diag()
        system += torch.kron(matrix, torch.outer(x, x))
        right += torch.outer(matrix @ r, x).reshape(-1)
    system += strength * system.diagonal().mean() * torch.eye(24)
    solution: Tensor = torch.linalg.solve(system, right)
    return START + solution.view(4, 6)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("strength", [1e-4, 1e-2, 10.0])
def test_the_fit_solves_the_dense_system(coupled: bool, strength: float) -> None:
    batch = batch_of(50, coupled=coupled)
    torch.testing.assert_close(fit([batch], strength), dense(batch, strength), rtol=0, atol=1e-5)


@pytest.mark.parametrize("coupled", [False, True])
def test_features_of_very_different_size_take_few_steps(coupled: bool) -> None:
    batch = batch_of(500, coupled=coupled)
    found = fit([batch], 1e-6, num_steps=12)
    torch.testing.assert_close(found, dense(batch, 1e-6), rtol=0, atol=1e-3)


def test_equal_matrices_take_one_step() -> None:
    batch = batch_of(50, coupled=True)
    same = CurvedBatch(batch.features, batch.missing, batch.weights[:1].expand(50, 4), True)
    torch.testing.assert_close(fit([same], num_steps=1), dense(same), rtol=0, atol=1e-6)


def test_great_strength_keeps_the_start() -> None:
    torch.testing.assert_close(fit([batch_of(50, coupled=True)], 1e12), START)


def test_targets_that_are_met_keep_the_start_exactly() -> None:
    batch = batch_of(50, coupled=True)
    met = CurvedBatch(batch.features, torch.zeros_like(batch.missing), batch.weights, True)
    assert torch.equal(fit([met]), START)


def test_tokens_that_mind_no_error_keep_the_start() -> None:
    batch = batch_of(50, coupled=False)
    careless = CurvedBatch(batch.features, batch.missing, torch.zeros_like(batch.weights), False)
    assert torch.equal(fit([careless]), START)


class Processes:
    """Two threads that sum tensors with each other, as processes do."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=10)
        self._given: list[Tensor] = [torch.zeros(0)] * 2
        self._calls = [0, 0]

    def reducer(self, rank: int) -> Callable[[Tensor], Tensor]:
        def reduce(tensor: Tensor) -> Tensor:
            self._given[rank] = tensor
            self._calls[rank] += 1
            self._barrier.wait()
            total = self._given[0] + self._given[1]
            self._barrier.wait()
            return total

        return reduce

    def run(self, batches: list[list[CurvedBatch]]) -> list[Tensor]:
        found = [torch.zeros(0)] * 2

        def work(rank: int) -> None:
            found[rank] = curved_ridge(
                START, batches[rank], 0.01, num_steps=100, reduce=self.reducer(rank)
            )

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert self._calls[0] == self._calls[1]
        return found


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("second", [[30], []], ids=["uneven", "one without tokens"])
def test_two_processes_find_the_weights_of_one(coupled: bool, second: list[int]) -> None:
    first = [batch_of(n, coupled=coupled, seed=n) for n in (20, 7)]
    others = [batch_of(n, coupled=coupled, seed=n) for n in second]
    found = Processes().run([first, others])
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], fit([*first, *others]), rtol=0, atol=1e-6)
