"""The joint refit of a layer's output matrices, as one system of equations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from lightning_smoe.compression.record import (
    BlockRecord,
    OutputFeatures,
    output_features,
)
from lightning_smoe.functional.moments import Moments
from lightning_smoe.functional.refit import Refit, ridge_toward
from lightning_smoe.models.layer import MoELayer

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RefitRecord:
    """One batch of one block, for the refit.

    Args:
        block: What the block did.
        target: What its output should be, without biases.
        held_out: Tokens on which strength and success are judged.
    """

    block: BlockRecord
    # Each batch has its own number of tokens.
    target: Float[Tensor, "_ hidden"]
    held_out: Bool[Tensor, " _"]


@dataclass(frozen=True)
class RefitOutcome:
    """What a refit did.

    Args:
        before: Squared error on held-out tokens before, relative to the targets' energy.
        after: The same after the fit on the other tokens.
        strength: Shrinkage that did best on them.
        applied: Whether the fit lowered the error, and so was carried out.
    """

    before: float
    after: float
    strength: float
    applied: bool

    def __str__(self) -> str:
        """Says it for the log."""
        errors = f"held-out layer error {self.before:.4f} -> {self.after:.4f}"
        if not self.applied:
            return f"{errors}: the refit is left out"
        return f"{errors} (strength {self.strength:g})"


def refit_jointly(
    layer: MoELayer,
    records: Sequence[RefitRecord],
    start: Float[Tensor, "hidden features"],
    refit: Refit,
    *,
    reduce: Reduce,
) -> tuple[Float[Tensor, "hidden features"], RefitOutcome]:
    """Fits all output matrices at once; see `sweeps.refit_by_sweeps`."""
    parts = [Moments.zeros(start.shape[1], start.shape[0], start.device) for _ in range(2)]
    for record in records:
        features = output_features(layer, record.block)
        for moments, chosen in zip(parts, (~record.held_out, record.held_out), strict=True):
            some = _chosen(features, chosen)
            moments.add(some.values, record.target[chosen], some.blocks)
    fitted, held_out = (moments.reduced(reduce) for moments in parts)
    whole = fitted.plus(held_out)
    if not (held_out.energy > 0 and fitted.energy > 0):  # Too little text to judge by.
        held_out = fitted = whole
    before = held_out.error(start).item()
    errors = {
        strength: held_out.error(ridge_toward(start, fitted.gram, fitted.cross, strength)).item()
        for strength in refit.strengths
    }
    outcome = judged(before, errors)
    if not outcome.applied:
        return start, outcome
    return ridge_toward(start, whole.gram, whole.cross, outcome.strength), outcome


def _chosen(features: OutputFeatures, chosen: Bool[Tensor, " tokens"]) -> OutputFeatures:
    """Restricts to some tokens."""
    place = chosen.cumsum(0) - 1
    blocks = [
        (columns, rows if isinstance(rows, slice) else place[rows[chosen[rows]]])
        for columns, rows in features.blocks
    ]
    return OutputFeatures(features.values[chosen], blocks)


def judged(before: float, errors: dict[float, float]) -> RefitOutcome:
    """Chooses the strength of least held-out error, and says whether it helps at all."""
    strength = min(errors, key=lambda each: errors[each])
    return RefitOutcome(before, errors[strength], strength, errors[strength] < before)
