"""The joint refit of a layer's output matrices, expert by expert where they are too wide."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_smoe.compression.record import expert_features
from lightning_smoe.compression.refit import Reduce, RefitOutcome, RefitRecord, judged
from lightning_smoe.functional.moments import Moments
from lightning_smoe.functional.refit import Refit, ridge_toward
from lightning_smoe.models.layer import MoELayer

# Sweeps end when one lowers the objective by less than this part of the targets' energy. Each costs
# one forward pass of the experts.
_SWEEP_GAIN = 1e-5
_MOST_SWEEPS = 20
# Sweeps for each strength that is tried: it starts where the next stronger one ended.
_TRIAL_SWEEPS = 3

# Each batch has its own number of tokens.
Masks = Sequence[Bool[Tensor, " _"]]


def refit_by_sweeps(
    layer: MoELayer,
    records: Sequence[RefitRecord],
    start: Float[Tensor, "hidden features"],
    refit: Refit,
    *,
    reduce: Reduce,
) -> tuple[Float[Tensor, "hidden features"], RefitOutcome]:
    """Fits the output matrices by block Gauss-Seidel: each expert to what the others leave over.

    The fixed point is the joint ridge solution `W_0 + (Y - W_0 Phi) Phi^T (Phi Phi^T + lam I)^-1`;
    memory is that of one expert's equations instead of all experts'. Strengths are tried from the
    largest down, with a few sweeps each.

    Args:
        layer: The block.
        records: What it did with each batch, and what its output should be.
        start: Output matrices W_0 before the fit, side by side.
        refit: Strengths to choose from, relative to the mean energy of a feature.
        reduce: Sum of a tensor over processes.

    Returns:
        The fitted matrices, and what the fit did.
    """
    # Rounded once, when all sweeps are done: residuals would drift from half-precision weights.
    sweep = _Sweep(layer, records, start.float(), reduce)
    held_out = [record.held_out for record in records]
    taught = [~mask for mask in held_out]
    everything = [torch.ones_like(mask) for mask in held_out]
    if not (sweep.target_energy(held_out) > 0 and sweep.target_energy(taught) > 0):
        held_out = taught = everything  # Too little text to judge by.
    before = sweep.error(held_out)
    fitted, errors = sweep.part(taught), {}
    for strength in sorted(refit.strengths, reverse=True):
        sweep.settle(fitted, strength, _TRIAL_SWEEPS)
        errors[strength] = sweep.error(held_out)
    outcome = judged(before, {strength: errors[strength] for strength in refit.strengths})
    if not outcome.applied:
        return start, outcome
    sweep.reset()
    sweep.settle(sweep.part(everything), outcome.strength, _MOST_SWEEPS)
    return sweep.weights.to(start.dtype), outcome


@dataclass(frozen=True, eq=False)
class _Part:
    """Some of the tokens, and the energies of every expert's features and of the targets there."""

    masks: Masks
    features: list[Tensor]
    targets: Tensor

    @property
    def mean_energy(self) -> Tensor:
        """Mean over the features that fire."""
        every = torch.cat(self.features)
        return every[every > 0].mean() if bool((every > 0).any()) else every.sum()


class _Sweep:
    """The state of a block Gauss-Seidel solution: weights, and what they leave over."""

    def __init__(
        self, layer: MoELayer, records: Sequence[RefitRecord], start: Tensor, reduce: Reduce
    ) -> None:
        self.weights, self._start = start.clone(), start
        self._layer, self._records, self._reduce = layer, records, reduce
        self._targets = [record.target for record in records]
        self._residuals = [target.float().clone() for target in self._targets]
        self._columns = columns_of(layer, start)
        for number, place in enumerate(self._columns):
            self._subtract(self._active(number), start[:, place])

    def part(self, masks: Masks) -> _Part:
        """Measures some of the tokens."""
        energies = []
        for number in range(len(self._columns)):
            chosen = zip(self._active(number), masks, strict=True)
            parts = [v[m[rows]].double().square().sum(0) for (rows, v), m in chosen]
            energies.append(self._reduce(torch.stack(parts).sum(0)))
        return _Part(masks, energies, self.target_energy(masks))

    def target_energy(self, masks: Masks) -> Tensor:
        """Sum of the squared targets of some tokens."""
        return self._squares(self._targets, masks)

    def error(self, masks: Masks) -> float:
        """Squared error relative to the targets' energy, on some tokens."""
        return (self._squares(self._residuals, masks) / self.target_energy(masks)).item()

    def reset(self) -> None:
        """Goes back to the weights before the fit."""
        for number, place in enumerate(self._columns):
            self._subtract(self._active(number), self._start[:, place] - self.weights[:, place])
        self.weights = self._start.clone()

    def settle(self, part: _Part, strength: float, most: int) -> None:
        """Sweeps until hardly anything changes, or as often as is allowed."""
        shrinkage = strength * part.mean_energy
        last = self._objective(part, shrinkage)
        for _ in range(most):
            self._run(part, shrinkage)
            now = self._objective(part, shrinkage)
            if last - now < _SWEEP_GAIN * part.targets:
                return
            last = now

    def _objective(self, part: _Part, shrinkage: Tensor) -> Tensor:
        change = (self.weights.double() - self._start.double()).square().sum()
        return self._squares(self._residuals, part.masks) + shrinkage * change

    def _run(self, part: _Part, shrinkage: Tensor) -> None:
        """Fits every expert in turn."""
        for number, place in enumerate(self._columns):
            fired = part.features[number] > 0
            if not bool(fired.any()):
                continue
            active = self._active(number)
            current = self.weights[:, place].clone()
            moments = self._left_over(active, current, part.masks).reduced(self._reduce)
            # Strength counts relative to the energy of these features alone.
            relative = (shrinkage / moments.gram.diagonal()[fired].mean()).item()
            fit = ridge_toward(self._start[:, place], moments.gram, moments.cross, relative)
            self.weights[:, place] = fit
            self._subtract(active, fit - current)

    def _active(self, number: int) -> list[tuple[Tensor | slice, Tensor]]:
        return [expert_features(self._layer, record.block, number) for record in self._records]

    def _left_over(
        self,
        active: Sequence[tuple[Tensor | slice, Tensor]],
        current: Float[Tensor, "hidden features"],
        masks: Masks,
    ) -> Moments:
        """Products of an expert's features with what all others leave for it to do."""
        moments = Moments.zeros(current.shape[1], current.shape[0], current.device)
        for residual, (rows, values), mask in zip(self._residuals, active, masks, strict=True):
            chosen = mask[rows]
            some = values[chosen]
            moments.add(some, residual[rows][chosen] + some.float() @ current.float().T)
        return moments

    def _subtract(
        self,
        active: Sequence[tuple[Tensor | slice, Tensor]],
        change: Float[Tensor, "hidden features"],
    ) -> None:
        """Takes what an expert contributes from the residuals, in place."""
        for residual, (rows, values) in zip(self._residuals, active, strict=True):
            residual[rows] -= values.float() @ change.float().T

    def _squares(self, tensors: Sequence[Tensor], masks: Masks) -> Tensor:
        parts = [t[m].double().square().sum() for t, m in zip(tensors, masks, strict=True)]
        return self._reduce(torch.stack(parts).sum())


def columns_of(layer: MoELayer, start: Float[Tensor, "hidden features"]) -> list[slice]:
    """The columns of every expert, and of the shared expert where there is one."""
    width = layer.intermediate_size
    columns = [slice(e * width, (e + 1) * width) for e in range(layer.num_experts)]
    routed = layer.num_experts * width
    return [*columns, slice(routed, None)] if start.shape[1] > routed else columns
