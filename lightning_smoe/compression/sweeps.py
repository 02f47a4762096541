"""The joint refit of a layer's output matrices, expert by expert where they are too wide."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_smoe.compression.record import expert_features
from lightning_smoe.compression.refit import Reduce, RefitOutcome, RefitRecord, judged
from lightning_smoe.functional.moments import Moments
from lightning_smoe.functional.refit import Refit, ridge_toward
from lightning_smoe.models.layer import MoELayer

# Sweeps end when one lowers the squared error by less than this part of the targets' energy. Each
# costs one forward pass of the experts.
_SWEEP_GAIN = 1e-5
_MOST_SWEEPS = 20


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
    memory is that of one expert's equations instead of all experts'. The strength is chosen by
    what each expert's fit alone would gain on held-out tokens, summed over experts.

    Args:
        layer: The block.
        records: What it did with each batch, and what its output should be.
        start: Output matrices W_0 before the fit, side by side.
        refit: Strengths to choose from, relative to the mean energy of a feature.
        reduce: Sum of a tensor over processes.

    Returns:
        The fitted matrices, and what the fit did.
    """
    sweep = _Sweep(layer, records, start, reduce)
    outcome = sweep.probe(refit.strengths)
    if outcome.applied:
        error = sweep.error()
        for _ in range(_MOST_SWEEPS):
            sweep.run(outcome.strength)
            error, last = sweep.error(), error
            if last - error < _SWEEP_GAIN:
                break
    return sweep.weights, outcome


class _Sweep:
    """The state of a block Gauss-Seidel solution: weights, and what they leave over."""

    def __init__(
        self, layer: MoELayer, records: Sequence[RefitRecord], start: Tensor, reduce: Reduce
    ) -> None:
        self.weights, self._start = start.clone(), start
        self._layer, self._records, self._reduce = layer, records, reduce
        self._residuals = [record.target.float().clone() for record in records]
        self._total = reduce(self._squares(self._residuals))
        self._columns = _columns(layer, start)
        energies = []
        for number, place in enumerate(self._columns):
            active = self._active(number)
            self._subtract(active, start[:, place])
            parts = [values.double().square().sum(0) for _, values in active]
            energies.append(reduce(torch.stack(parts).sum(0)))
        self._energies = energies
        fired = torch.cat(energies)
        self._mean_energy = fired[fired > 0].mean() if bool((fired > 0).any()) else fired.sum()

    def error(self) -> float:
        """Squared error relative to the targets' energy, on all tokens."""
        return float(self._reduce(self._squares(self._residuals)) / self._total)

    def run(self, strength: float) -> None:
        """Fits every expert in turn."""
        for number, place in self._firing():
            active = self._active(number)
            current = self.weights[:, place].clone()
            moments = self._left_over(active, current, None).reduced(self._reduce)
            self.weights[:, place] = self._fit(number, moments, strength)
            self._subtract(active, self.weights[:, place] - current)

    def probe(self, strengths: Sequence[float]) -> RefitOutcome:
        """Judges strengths by what each expert's fit alone gains on held-out tokens."""
        masks = [record.held_out for record in self._records]
        held = self._reduce(
            self._squares([r[m] for r, m in zip(self._targets, masks, strict=True)])
        )
        fitted = self._reduce(torch.stack([(~m).sum() for m in masks]).sum())
        if not (held > 0 and fitted > 0):  # Too little text to judge by.
            everything = [torch.ones_like(mask) for mask in masks]
            held, masks, others = self._total, everything, everything
        else:
            others = [~mask for mask in masks]
        left = [r[m] for r, m in zip(self._residuals, masks, strict=True)]
        before = float(self._reduce(self._squares(left)) / held)
        errors = dict.fromkeys(strengths, before)
        for number, place in self._firing():
            active = self._active(number)
            start = self._start[:, place]
            judge, teach = (
                self._left_over(active, start, mask).reduced(self._reduce)
                for mask in (masks, others)
            )
            for strength in strengths:
                fit = self._fit(number, teach, strength)
                gain = (judge.error(start) - judge.error(fit)) * judge.energy / held
                errors[strength] -= gain.item() if judge.energy > 0 else 0.0
        return judged(before, errors)

    @property
    def _targets(self) -> list[Tensor]:
        return [record.target for record in self._records]

    def _firing(self) -> list[tuple[int, slice]]:
        return [(n, c) for n, c in enumerate(self._columns) if bool((self._energies[n] > 0).any())]

    def _active(self, number: int) -> list[tuple[Tensor | slice, Tensor]]:
        return [expert_features(self._layer, record.block, number) for record in self._records]

    def _fit(self, number: int, moments: Moments, strength: float) -> Tensor:
        fired = moments.gram.diagonal()
        own = fired[fired > 0].mean() if bool((fired > 0).any()) else fired.new_ones(())
        relative = (strength * self._mean_energy / own).item()
        start = self._start[:, self._columns[number]]
        return ridge_toward(start, moments.gram, moments.cross, relative)

    def _left_over(
        self,
        active: Sequence[tuple[Tensor | slice, Tensor]],
        current: Float[Tensor, "hidden features"],
        masks: Sequence[Tensor] | None,
    ) -> Moments:
        """Products of an expert's features with what all others leave for it to do."""
        moments = Moments.zeros(current.shape[1], current.shape[0], current.device)
        for number, (residual, (rows, values)) in enumerate(
            zip(self._residuals, active, strict=True)
        ):
            target = residual[rows] + values.float() @ current.float().T
            chosen = slice(None) if masks is None else masks[number][rows]
            moments.add(values[chosen], target[chosen])
        return moments

    def _subtract(
        self,
        active: Sequence[tuple[Tensor | slice, Tensor]],
        change: Float[Tensor, "hidden features"],
    ) -> None:
        """Takes what an expert contributes from the residuals, in place."""
        for residual, (rows, values) in zip(self._residuals, active, strict=True):
            residual[rows] -= values.float() @ change.float().T

    @staticmethod
    def _squares(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([t.double().square().sum() for t in tensors]).sum()


def _columns(layer: MoELayer, start: Float[Tensor, "hidden features"]) -> list[slice]:
    """The columns of every expert, and of the shared expert where there is one."""
    width = layer.intermediate_size
    columns = [slice(e * width, (e + 1) * width) for e in range(layer.num_experts)]
    routed = layer.num_experts * width
    return [*columns, slice(routed, None)] if start.shape[1] > routed else columns
