"""Points in space that lie at given distances, for clusterings that take means of points."""

import torch
from jaxtyping import Float64
from torch import Tensor

# One minus a cosine is at most 2; rounding may add this much.
_LARGEST_COSINE_DISTANCE = 2 + 1e-6


def classical_scaling(
    distance: Float64[Tensor, "experts experts"],
) -> Float64[Tensor, "experts coordinates"]:
    """Places one point an expert (rows) at these Euclidean distances (Torgerson 1952).

    Exact for distances between points of any space, such as `Output` and Euclidean `MeanOutput`;
    others are approximated by dropping what no real coordinate can hold. Points are one more than
    the dimensions they can span.
    """
    squared = distance.square()
    by_row = squared.mean(1, keepdim=True)
    centered = (by_row + by_row.mT - squared - squared.mean()) / 2
    return _factor(centered)[:, 1:]


def unit_vectors(
    distance: Float64[Tensor, "experts experts"],
) -> Float64[Tensor, "experts experts"]:
    """Places one vector of length one an expert (rows), the distance being one minus the cosine.

    Raises:
        ValueError: A distance is no such thing.
    """
    if not bool((distance <= _LARGEST_COSINE_DISTANCE).all()):
        raise ValueError(
            f"a distance of {float(distance.max()):g} is not one minus a cosine, which is 0 to 2; "
            "take a distance that measures cosines"
        )
    return torch.nn.functional.normalize(_factor(1 - distance))


def _factor(
    gram: Float64[Tensor, "experts experts"],
) -> Float64[Tensor, "experts experts"]:
    """Finds vectors (rows) with these inner products, or the nearest; the least spread is first."""
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()
