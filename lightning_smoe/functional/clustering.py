"""Groups of experts from their distances: who shares a slot with whom."""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

# Mass of an expert that no token visits, relative to the heaviest: far below one token in any
# calibration set, so it costs nothing to merge, and far above zero, so it joins its nearest.
_MASS_FLOOR = 1e-12


class Clusterer(ABC):
    """Partition of the experts of one layer into a given number of groups."""

    @abstractmethod
    def __call__(
        self,
        distance: Float64[Tensor, "experts experts"],
        mass: Float64[Tensor, " experts"],
        num_groups: int,
    ) -> Int64[Tensor, " experts"]:
        """Assigns every expert to a group.

        Args:
            distance: Distances between experts: symmetric, with a zero diagonal.
            mass: Weight of each expert in its group, at least zero; only its ratios matter.
            num_groups: Number of groups, from 1 to the number of experts.

        Returns:
            Group of each expert; groups are numbered by first appearance and none is empty.

        Raises:
            ValueError: There cannot be that many groups.
        """


@dataclass(frozen=True)
class Agglomerative(Clusterer):
    """Hierarchical clustering on the distances (scikit-learn); ignores mass.

    Average linkage on mean outputs is HC-SMoE (https://arxiv.org/abs/2410.08589).

    Args:
        linkage: How the distance between two groups follows from their members'.
    """

    linkage: Literal["average", "complete", "single"] = "average"

    def __call__(
        self,
        distance: Float64[Tensor, "experts experts"],
        mass: Float64[Tensor, " experts"],
        num_groups: int,
    ) -> Int64[Tensor, " experts"]:
        _check_num_groups(num_groups, len(mass))
        if num_groups == len(mass):  # scikit-learn refuses a single expert.
            return torch.arange(num_groups, device=distance.device)
        # Imported where it is used: half a second of every start.
        from sklearn.cluster import AgglomerativeClustering

        model = AgglomerativeClustering(num_groups, metric="precomputed", linkage=self.linkage)
        return _numbered(model.fit_predict(distance.numpy(force=True)).tolist(), distance)


@dataclass(frozen=True)
class KMeans(Clusterer):
    """K-means with k-means++ seeding on points at the given distances; ignores mass.

    With the distance `Output` this clusters the experts' outputs over all tokens, as Sub-MoE does
    (https://arxiv.org/abs/2506.23266, Eq. 3). Distances that no points in space have are
    approximated by classical scaling.

    Args:
        num_starts: Seedings tried, at least 1; the tightest groups win.
        seed: Seed of the seedings.
    """

    num_starts: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_starts < 1:
            raise ValueError(f"num_starts={self.num_starts} tries nothing; take 1 or more")

    def __call__(
        self,
        distance: Float64[Tensor, "experts experts"],
        mass: Float64[Tensor, " experts"],
        num_groups: int,
    ) -> Int64[Tensor, " experts"]:
        _check_num_groups(num_groups, len(mass))
        points = _coordinates(distance).numpy(force=True)
        # Imported where it is used: half a second of every start.
        from sklearn import cluster
        from sklearn.exceptions import ConvergenceWarning

        model = cluster.KMeans(num_groups, n_init=self.num_starts, random_state=self.seed)
        with warnings.catch_warnings():
            # It warns when fewer experts are distinct than groups are asked for: repaired below.
            warnings.simplefilter("ignore", ConvergenceWarning)
            labels = torch.from_numpy(model.fit_predict(points)).to(distance.device, torch.int64)
        return _numbered(_without_empty_groups(labels, distance, num_groups), distance)


@dataclass(frozen=True)
class GateMassWard(Clusterer):
    """Greedy merging by the squared error it adds, experts weighing as much as their mass.

    Joining groups a and b costs `m_a m_b / (m_a + m_b) ||F_a - F_b||^2`, with m the mass and F the
    mass-weighted mean output: what an average merged by mass loses, if routing weights did not
    vary over tokens. At equal masses it is Ward's method. Experts without mass join their nearest
    at no cost.
    """

    def __call__(
        self,
        distance: Float64[Tensor, "experts experts"],
        mass: Float64[Tensor, " experts"],
        num_groups: int,
    ) -> Int64[Tensor, " experts"]:
        _check_num_groups(num_groups, len(mass))
        labels = list(range(len(mass)))
        merges = sorted(_ward_merges(distance.cpu(), mass.cpu()), key=lambda merge: merge[0])
        for _, kept, gone in merges[: len(mass) - num_groups]:
            old, new = labels[gone], labels[kept]
            labels = [new if label == old else label for label in labels]
        return _numbered(labels, distance)


def _check_num_groups(num_groups: int, num_experts: int) -> None:
    if not 1 <= num_groups <= num_experts:
        raise ValueError(
            f"num_groups={num_groups} is impossible with {num_experts} experts; "
            f"take 1 to {num_experts}"
        )


def _numbered(labels: list[int], like: Tensor) -> Int64[Tensor, " experts"]:
    """Renumbers groups by first appearance, on the device of `like`."""
    number = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([number[label] for label in labels], device=like.device)


def _coordinates(
    distance: Float64[Tensor, "experts experts"],
) -> Float64[Tensor, "experts experts"]:
    """Places one point an expert (rows) at these distances: classical scaling."""
    squared = distance.square()
    by_row = squared.mean(1, keepdim=True)
    inner = (by_row + by_row.mT - squared - squared.mean()) / 2
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(inner)
    return vectors * values.clamp(min=0).sqrt()


def _without_empty_groups(
    labels: Int64[Tensor, " experts"],
    distance: Float64[Tensor, "experts experts"],
    num_groups: int,
) -> list[int]:
    """Gives each empty group the member of the largest group that lies farthest from its mates."""
    labels = labels.clone()
    for group in range(num_groups):
        sizes = labels.bincount(minlength=num_groups)
        if sizes[group] == 0:
            members = (labels == sizes.argmax()).nonzero().squeeze(1)
            spread = distance[members][:, members].sum(1)
            labels[members[spread.argmax()]] = group
    return [int(label) for label in labels]


def _ward_merges(
    distance: Float64[Tensor, "experts experts"], mass: Float64[Tensor, " experts"]
) -> list[tuple[float, int, int]]:
    """Lists all merges as (cost, slot kept, slot freed), children before parents.

    Nearest-neighbour chain: follow nearest neighbours until two are each other's, and merge them.
    It finds the merges of the greedy search in O(experts^2), as a merged group is never nearer to
    a third than both its parts were (Murtagh 1983).
    """
    heaviest = mass.max()
    mass = (mass / heaviest).clamp(min=_MASS_FLOOR) if heaviest > 0 else torch.ones_like(mass)
    cost = distance.square() * torch.outer(mass, mass) / (mass.unsqueeze(0) + mass.unsqueeze(1))
    cost.fill_diagonal_(torch.inf)
    height = [0.0] * len(mass)
    merges: list[tuple[float, int, int]] = []
    alive = list(range(len(mass)))
    chain: list[int] = []
    while len(alive) > 1:
        chain = chain or [alive[0]]
        tip = chain[-1]
        nearest = int(cost[tip].argmin())
        # At a tie the chain turns back, else it could run in a circle.
        if len(chain) == 1 or cost[tip, nearest] < cost[tip, chain[-2]]:
            chain.append(nearest)
            continue
        kept, gone = chain[-2:]
        del chain[-2:]
        # Rounding must not let a merge cost less than those it builds on.
        height[kept] = max(float(cost[kept, gone]), height[kept], height[gone])
        merges.append((height[kept], kept, gone))
        alive.remove(gone)
        _join(cost, mass, kept, gone)
    return merges


def _join(
    cost: Float64[Tensor, "experts experts"],
    mass: Float64[Tensor, " experts"],
    kept: int,
    gone: int,
) -> None:
    """Updates costs and masses in place after one merge (Lance and Williams 1967)."""
    joint = (mass + mass[kept]) * cost[kept] + (mass + mass[gone]) * cost[gone]
    joint = (joint - mass * cost[kept, gone]) / (mass + mass[kept] + mass[gone])
    cost[kept], cost[:, kept] = joint, joint
    cost[gone], cost[:, gone] = torch.inf, torch.inf
    mass[kept] += mass[gone]
