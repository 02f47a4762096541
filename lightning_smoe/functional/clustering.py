"""Groups of experts from their distances: who shares a slot with whom."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from lightning_smoe.functional.partition import check_num_groups, numbered, positive_mass
from lightning_smoe.functional.scaling import classical_scaling


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
    """Hierarchical clustering on the distances (scipy); ignores mass.

    Average linkage on mean outputs is HC-SMoE (https://arxiv.org/abs/2410.08589). Ward linkage
    works on points at these distances: exact for Euclidean ones, an approximation for others.

    Args:
        linkage: How the distance between two groups follows from their members'.
    """

    linkage: Literal["average", "complete", "single", "ward"] = "average"

    def __call__(
        self,
        distance: Float64[Tensor, "experts experts"],
        mass: Float64[Tensor, " experts"],
        num_groups: int,
    ) -> Int64[Tensor, " experts"]:
        check_num_groups(num_groups, len(mass))
        num_experts = len(mass)
        if num_groups == num_experts:  # scipy refuses a single expert.
            return torch.arange(num_groups, device=distance.device)
        # Imported where it is used: a quarter of a second of every start.
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import squareform

        if self.linkage == "ward":
            rows = classical_scaling(distance).numpy(force=True)
        else:
            rows = squareform(distance.numpy(force=True), checks=False)
        merges = torch.from_numpy(linkage(rows, self.linkage))[:, :2].long()
        labels = torch.arange(num_experts)
        for node, (first, second) in enumerate(merges[: num_experts - num_groups], num_experts):
            labels[(labels == first) | (labels == second)] = node
        return numbered(labels.to(distance.device))


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
        check_num_groups(num_groups, len(mass))
        labels = torch.arange(len(mass))
        merges = sorted(_ward_merges(distance.cpu(), mass.cpu()), key=lambda merge: merge[0])
        for _, kept, gone in merges[: len(mass) - num_groups]:
            labels[labels == labels[gone]] = labels[kept]
        return numbered(labels.to(distance.device))


def _ward_merges(
    distance: Float64[Tensor, "experts experts"], mass: Float64[Tensor, " experts"]
) -> list[tuple[float, int, int]]:
    """Lists all merges as (cost, slot kept, slot freed), children before parents.

    Nearest-neighbour chain: follow nearest neighbours until two are each other's, and merge them.
    It finds the merges of the greedy search in O(experts^2), as a merged group is never nearer to
    a third than both its parts were (Murtagh 1983).
    """
    mass = positive_mass(mass)
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
