"""The joint refit of a layer's output matrices where there are fewer tokens than features."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from lightning_smoe.compression.record import expert_features
from lightning_smoe.compression.refit import Reduce, RefitOutcome, RefitRecord, judged
from lightning_smoe.compression.sweeps import columns_of
from lightning_smoe.errors import InputError
from lightning_smoe.functional.refit import Refit
from lightning_smoe.models.layer import MoELayer


def refit_by_tokens(
    layer: MoELayer,
    records: Sequence[RefitRecord],
    start: Float[Tensor, "hidden features"],
    refit: Refit,
    *,
    reduce: Reduce,  # noqa: ARG001 - the signature of all fits
) -> tuple[Float[Tensor, "hidden features"], RefitOutcome]:
    """Fits all output matrices at once, by equations that are as many as tokens.

    The joint ridge solution in its dual form,
    `W_0 + (Y - W_0 Phi) (Phi^T Phi + lam I)^-1 Phi^T`: the matrix to invert is tokens by tokens,
    put together expert by expert, where the other form's is features by features.

    Args:
        layer: The block.
        records: What it did with each batch, and what its output should be.
        start: Output matrices W_0 before the fit, side by side.
        refit: Strengths to choose from, relative to the mean energy of a feature.
        reduce: Sum of a tensor over processes; of one, as products of tokens need both.

    Returns:
        The fitted matrices, and what the fit did.
    """
    problem = _Problem(layer, records, start.float())
    held_out = torch.cat([record.held_out for record in records])
    taught = ~held_out
    if not (problem.targets[held_out].any() and problem.targets[taught].any()):
        held_out = taught = torch.ones_like(held_out)  # Too little text to judge by.
    before = problem.error(held_out, problem.residual[held_out])
    between = problem.kernel[held_out][:, taught]
    errors = {}
    energy = problem.mean_energy(taught)
    for strength in refit.strengths:
        shares = problem.shares(taught, strength * energy)
        errors[strength] = problem.error(held_out, problem.residual[held_out] - between @ shares)
    outcome = judged(before, errors)
    if not outcome.applied:
        return start, outcome
    every = torch.ones_like(held_out)
    shrinkage = outcome.strength * problem.mean_energy(every)
    return problem.weights(problem.shares(every, shrinkage)).to(start.dtype), outcome


class _Problem:
    """Products of the features of every two tokens, and what the start weights leave over."""

    def __init__(
        self,
        layer: MoELayer,
        records: Sequence[RefitRecord],
        start: Float[Tensor, "hidden features"],
    ) -> None:
        self._layer, self._records, self._start = layer, records, start
        self.targets = torch.cat([record.target for record in records]).double()
        count = len(self.targets)
        self.residual: Float64[Tensor, "tokens hidden"] = self.targets.clone()
        self.kernel: Float64[Tensor, "tokens tokens"] = start.new_zeros(
            count, count, dtype=torch.float64
        )
        for place, tokens, values in self._blocks():
            self.kernel[tokens[:, None], tokens] += (values @ values.T).double()
            self.residual[tokens] -= (values @ start[:, place].T).double()

    def _blocks(self) -> Iterator[tuple[slice, Tensor, Float[Tensor, "active intermediate"]]]:
        """Columns of each expert, the tokens for which it fires, and its features there."""
        for number, place in enumerate(columns_of(self._layer, self._start)):
            tokens, values, first = [], [], 0
            for record in self._records:
                rows, some = expert_features(self._layer, record.block, number)
                every = torch.arange(len(record.target), device=some.device)
                tokens.append(first + every[rows])
                values.append(some.float())
                first += len(every)
            yield place, torch.cat(tokens), torch.cat(values)

    def error(self, tokens: Bool[Tensor, " tokens"], left: Float64[Tensor, "some hidden"]) -> float:
        """Squared error relative to the targets' energy, on some tokens."""
        return (left.square().sum() / self.targets[tokens].square().sum()).item()

    def shares(
        self, tokens: Bool[Tensor, " tokens"], shrinkage: float
    ) -> Float64[Tensor, "some hidden"]:
        """What each token adds to the weights, in units of its features."""
        matrix = self.kernel[tokens][:, tokens]
        matrix.diagonal().add_(shrinkage)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            raise InputError(
                "the refit's strength is too small for a fit on so few calibration tokens; raise "
                "it tenfold, or data.calib_tokens"
            )
        return torch.cholesky_solve(self.residual[tokens], factor)

    def mean_energy(self, tokens: Bool[Tensor, " tokens"]) -> float:
        """Mean over the features that fire of their energy."""
        total, count = 0.0, 0
        for _, active, values in self._blocks():
            energy = values[tokens[active]].double().square().sum(0)
            total += float(energy.sum())
            count += int((energy > 0).sum())
        return total / count if count else 0.0

    def weights(self, shares: Float64[Tensor, "tokens hidden"]) -> Float[Tensor, "hidden features"]:
        """The start weights, and what all tokens add to them."""
        weights, parts = self._start.clone(), shares.float()
        for place, tokens, values in self._blocks():
            weights[:, place] += parts[tokens].T @ values
        return weights
