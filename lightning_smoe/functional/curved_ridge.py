"""Least squares in which every token weighs its errors by a matrix of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]

# Products of tokens are formed in float32: their rounding hides what is left below this.
_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class CurvedBatch:
    """Tokens of one batch: features, what the start weights miss of the targets, and the matrices.

    Args:
        features: What the weights multiply, in any dtype.
        missing: Targets less what the start weights give.
        weights: Diagonal w of each token's matrix, at least 0.
        coupled: Whether the matrix is `diag w - w w^T`, for w that sum to one, and not `diag w`.
    """

    features: Float[Tensor, "tokens features"]
    missing: Float[Tensor, "tokens outputs"]
    weights: Float[Tensor, "tokens outputs"]
    coupled: bool

    @property
    def wide(self) -> Float[Tensor, "tokens features"]:
        """Features in float32 or wider."""
        return self.features.to(torch.promote_types(self.features.dtype, torch.float32))

    def curve(self, errors: Float[Tensor, "tokens outputs"]) -> Float64[Tensor, "outputs features"]:
        """Multiplies each token's errors by its matrix and its features, and adds up the tokens."""
        weighted = self.weights * errors
        if not self.coupled:
            return (weighted.T @ self.wide).double()
        weighted = weighted - self.weights * weighted.sum(1, keepdim=True)
        product = (weighted.T @ self.wide).double()
        # Outputs add up to nothing: of what rounding leaves, only the shrinkage would hold it back.
        share = self.weights.sum(0).double() / max(1, len(self.weights))
        return product - share[:, None] * product.sum(0)

    def total(self) -> Float[Tensor, "outputs outputs"]:
        """Sum of the matrices of all tokens."""
        diagonal = self.weights.sum(0).diag()
        return diagonal - self.weights.T @ self.weights if self.coupled else diagonal

    def trace(self) -> Float[Tensor, ""]:
        """Sum over tokens of the matrix's trace times the features' energy."""
        squared = self.weights.square() if self.coupled else 0
        return ((self.weights - squared).sum(1) * self.wide.square().sum(1)).sum()


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over all tokens of all processes.

    Args:
        gram: Features times features.
        total: The tokens' matrices.
        right: The tokens' matrices times what is missing, times features.
        trace: Trace of the matrix of the whole system.
    """

    gram: Float64[Tensor, "features features"]
    total: Float64[Tensor, "outputs outputs"]
    right: Float64[Tensor, "outputs features"]
    trace: Float64[Tensor, ""]


def curved_ridge(
    start: Float[Tensor, "outputs features"],
    batches: Sequence[CurvedBatch],
    strength: float,
    *,
    num_steps: int,
    reduce: Reduce,
) -> Float[Tensor, "outputs features"]:
    """Fits weights to targets where a token's matrix H says which of its errors matter.

    `argmin_W sum_x (W phi - t)^T H (W phi - t) + lam ||W - W_0||^2` over all outputs together, by
    conjugate gradients on `sum_x H D phi phi^T + lam D = sum_x H (t - W_0 phi) phi^T` with
    `D = W - W_0`, preconditioned by `(sum_x H) D (sum_x phi phi^T)`. Features that never fired
    keep their start weights.

    Args:
        start: Weights W_0 to fall back on where the data say nothing.
        batches: Tokens of this process.
        strength: lam relative to the mean diagonal of the system, above 0.
        num_steps: Steps at most.
        reduce: Sum of a tensor over processes, which all call it equally often.

    Returns:
        The fitted weights in the dtype of the start weights.
    """
    sums = _sums(start, batches, reduce)
    fired = int((sums.gram.diagonal() > 0).sum())
    penalty = strength * sums.trace / max(1, len(start) * fired)
    if not bool(penalty > 0):
        return start.clone()
    precondition = _preconditioner(sums, penalty)

    def dot(one: Tensor, other: Tensor) -> Tensor:
        # Every process holds the whole, so this only counts it that many times in all ratios; but
        # they then see the same number and take the same steps, whatever their rounding.
        return reduce((one * other).sum())

    change = torch.zeros_like(sums.right)
    residual = sums.right
    direction = precondition(residual)
    size = first = dot(residual, direction)
    for _ in range(num_steps):
        if bool(size <= _TOLERANCE**2 * first):
            break
        product = reduce(_system(batches, direction)) + penalty * direction
        length = size / dot(direction, product)
        change = change + length * direction
        residual = residual - length * product
        better = precondition(residual)
        size, last = dot(residual, better), size
        direction = better + size / last * direction
    return (start.double() + change).to(start.dtype)


def _sums(
    start: Float[Tensor, "outputs features"], batches: Sequence[CurvedBatch], reduce: Reduce
) -> _Sums:
    outputs, features = start.shape
    shapes = ((features, features), (outputs, outputs), (outputs, features), ())
    gram, total, right, trace = (start.new_zeros(shape, dtype=torch.float64) for shape in shapes)
    for batch in batches:
        wide = batch.wide
        gram += wide.T @ wide
        total += batch.total()
        right += batch.curve(batch.missing)
        trace += batch.trace()
    return _Sums(reduce(gram), reduce(total), reduce(right), reduce(trace))


def _system(
    batches: Sequence[CurvedBatch], direction: Float64[Tensor, "outputs features"]
) -> Float64[Tensor, "outputs features"]:
    """This process's part of the system's matrix, times a direction."""
    result = torch.zeros_like(direction)
    for batch in batches:
        wide = batch.wide
        result += batch.curve(wide @ direction.to(wide.dtype).T)
    return result


def _preconditioner(sums: _Sums, penalty: Float64[Tensor, ""]) -> Callable[[Tensor], Tensor]:
    """Solves the system in which every token has the mean matrix and the mean energies."""
    curvature, outer = torch.linalg.eigh(sums.total)
    energy, inner = torch.linalg.eigh(sums.gram)
    scale = sums.trace / (sums.total.trace() * sums.gram.trace())
    # Rounding makes the smallest eigenvalues negative, which no sum of squares is.
    spectrum = scale * curvature.clamp(min=0)[:, None] * energy.clamp(min=0) + penalty
    return lambda residual: outer @ ((outer.T @ residual @ inner) / spectrum) @ inner.T
