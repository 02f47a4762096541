"""K-means on the experts' outputs, on rows of their similarities, and on directions."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from lightning_smoe.functional.clustering import Clusterer
from lightning_smoe.functional.partition import (
    canonical_order,
    check_num_groups,
    fill_empty_groups,
    numbered,
)
from lightning_smoe.functional.scaling import classical_scaling, unit_vectors

# Rounds of one start: K-means on a few hundred experts settles within twenty.
_MAX_ROUNDS = 100


@dataclass(frozen=True)
class KMeans(Clusterer):
    """K-means with k-means++ seeding (scikit-learn); ignores mass.

    On points at the distances `Output` it clusters the experts' outputs over all tokens, as Sub-MoE
    does (https://arxiv.org/abs/2506.23266, Eq. 3). On rows of the similarity matrix, as some
    replications of Sub-MoE do, experts are alike that are near to the same others, which says
    little of how far apart they are themselves. The order of the experts does not matter.

    Args:
        num_starts: Seedings tried, at least 1; the tightest groups win.
        seed: Seed of the seedings.
        points: What is clustered: `classical_scaling` for points at the given distances, as nearly
            as points in space can have them, or `similarity_rows` for the rows of `1 - distance`.
    """

    num_starts: int = 10
    seed: int = 0
    points: Literal["classical_scaling", "similarity_rows"] = "classical_scaling"

    def __post_init__(self) -> None:
        _check_num_starts(self.num_starts)

    def __call__(
        self,
        distance: Float64[Tensor, "experts experts"],
        mass: Float64[Tensor, " experts"],
        num_groups: int,
    ) -> Int64[Tensor, " experts"]:
        check_num_groups(num_groups, len(mass))

        def partition(ordered: Tensor) -> Tensor:
            by_rows = self.points == "similarity_rows"
            points = 1 - ordered if by_rows else classical_scaling(ordered)
            return _tightest(points, num_groups, self.num_starts, self.seed)

        return _in_canonical_order(partition, distance, num_groups)


@dataclass(frozen=True)
class SphericalKMeans(Clusterer):
    """K-means on directions: maximises `sum_i cos(x_i, center of its group)`; ignores mass.

    A center is the direction of its members' sum (Dhillon and Modha 2001,
    https://doi.org/10.1023/A:1007612920971), so experts that differ in scale alone are the same.
    The distance has to be one minus a cosine, of expert outputs say; the vectors it is the cosine
    of are found from it. The order of the experts does not matter.

    Args:
        num_starts: Seedings tried, at least 1; the tightest groups win.
        seed: Seed of the seedings.
    """

    num_starts: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        _check_num_starts(self.num_starts)

    def __call__(
        self,
        distance: Float64[Tensor, "experts experts"],
        mass: Float64[Tensor, " experts"],
        num_groups: int,
    ) -> Int64[Tensor, " experts"]:
        check_num_groups(num_groups, len(mass))

        def partition(ordered: Tensor) -> Tensor:
            points = unit_vectors(ordered)
            starts = range(self.seed, self.seed + self.num_starts)
            found = [_by_direction(points, num_groups, start) for start in starts]
            return max(found, key=lambda labels: _alignment(points, labels, num_groups))

        return _in_canonical_order(partition, distance, num_groups)


def _check_num_starts(num_starts: int) -> None:
    if num_starts < 1:
        raise ValueError(f"num_starts={num_starts} tries nothing; take 1 or more")


def _in_canonical_order(
    partition: Callable[[Tensor], Tensor],
    distance: Float64[Tensor, "experts experts"],
    num_groups: int,
) -> Int64[Tensor, " experts"]:
    """Partitions the experts whatever their order: seedings are drawn by position."""
    if num_groups == len(distance):  # Nothing to seed, and a single expert has no coordinates.
        return torch.arange(num_groups, device=distance.device)
    order = canonical_order(distance)
    ordered = distance[order][:, order]
    labels = torch.empty_like(order)
    labels[order] = fill_empty_groups(partition(ordered), ordered, num_groups)
    return numbered(labels)


def _tightest(
    points: Float64[Tensor, "experts coordinates"], num_groups: int, num_starts: int, seed: int
) -> Int64[Tensor, " experts"]:
    """Runs scikit-learn's K-means; groups may be empty where points coincide."""
    # Imported where it is used: half a second of every start.
    from sklearn.cluster import KMeans as Lloyd
    from sklearn.exceptions import ConvergenceWarning

    model = Lloyd(num_groups, n_init=num_starts, random_state=seed)
    with warnings.catch_warnings():
        # It warns when fewer experts are distinct than groups are asked for: repaired later.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = torch.from_numpy(model.fit_predict(points.numpy(force=True)))
    return labels.to(points.device, torch.int64)


def _by_direction(
    points: Float64[Tensor, "experts coordinates"], num_groups: int, seed: int
) -> Int64[Tensor, " experts"]:
    """Assigns to the nearest direction and takes the directions anew, until nothing moves."""
    from sklearn.cluster import kmeans_plusplus

    _, seeds = kmeans_plusplus(points.numpy(force=True), num_groups, random_state=seed)
    centers = points[torch.from_numpy(seeds).to(points.device)]
    labels = (points @ centers.mT).argmax(1)
    for _ in range(_MAX_ROUNDS):
        before = labels
        labels = (points @ normalize(_group_sums(points, labels, num_groups)).mT).argmax(1)
        if torch.equal(labels, before):
            break
    return labels


def _alignment(
    points: Float64[Tensor, "experts coordinates"],
    labels: Int64[Tensor, " experts"],
    num_groups: int,
) -> float:
    """Sums the cosines between points and the centers of their groups."""
    return float(_group_sums(points, labels, num_groups).norm(dim=1).sum())


def _group_sums(
    points: Float64[Tensor, "experts coordinates"],
    labels: Int64[Tensor, " experts"],
    num_groups: int,
) -> Float64[Tensor, "groups coordinates"]:
    return one_hot(labels, num_groups).to(points.dtype).mT @ points
