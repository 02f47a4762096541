"""Groups around the experts of highest mass: the published ways to let the others join."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from lightning_smoe.functional.clustering import Clusterer
from lightning_smoe.functional.partition import check_num_groups, numbered


@dataclass(frozen=True)
class DominantAssignment(Clusterer):
    """The experts of highest mass found a group each; every other joins the nearest of them.

    M-SMoE (https://arxiv.org/abs/2310.01334), with frequency as mass and `RouterLogit` as distance;
    MergeMoE (https://arxiv.org/abs/2510.14436) does it with a distance of weights. At equal mass or
    distance the first expert comes first.
    """

    def __call__(
        self,
        distance: Float64[Tensor, "experts experts"],
        mass: Float64[Tensor, " experts"],
        num_groups: int,
    ) -> Int64[Tensor, " experts"]:
        check_num_groups(num_groups, len(mass))
        centroids = _by_mass(mass)[:num_groups].to(distance.device)
        labels = distance[:, centroids].argmin(1)
        # A centroid stays with itself, whoever else is at distance zero.
        labels[centroids] = torch.arange(num_groups, device=distance.device)
        return numbered(labels)


@dataclass(frozen=True)
class PseudoPruning(Clusterer):
    """The experts of highest mass absorb their nearest others, the heaviest first, until full.

    REAM (https://arxiv.org/abs/2604.04356), with REAP saliency as mass: one centroid after the
    other, in order of falling mass, takes the nearest experts that are still free, and all it can
    hold. So the heaviest form large groups and most of the rest stay alone, close to pruning. At
    equal mass or distance the first expert comes first.

    Args:
        capacity: Most experts of one group, its centroid among them (C of the paper), at least 2.
    """

    capacity: int = 16

    def __post_init__(self) -> None:
        if self.capacity < 2:
            raise ValueError(
                f"capacity={self.capacity} lets no expert join another; take 2 or more"
            )

    def __call__(
        self,
        distance: Float64[Tensor, "experts experts"],
        mass: Float64[Tensor, " experts"],
        num_groups: int,
    ) -> Int64[Tensor, " experts"]:
        check_num_groups(num_groups, len(mass))
        if self.capacity * num_groups < len(mass):
            raise ValueError(
                f"capacity={self.capacity} leaves no room for {len(mass)} experts in {num_groups} "
                f"groups; raise it to {-(-len(mass) // num_groups)} or more"
            )
        ranked = _by_mass(mass).tolist()
        nearest = distance.argsort(dim=1, stable=True).tolist()
        free = set(ranked[num_groups:])
        labels = torch.empty_like(mass, dtype=torch.int64)
        for group, centroid in enumerate(ranked[:num_groups]):
            joining = [expert for expert in nearest[centroid] if expert in free]
            joining = joining[: self.capacity - 1]
            labels[[centroid, *joining]] = group
            free.difference_update(joining)
        return numbered(labels)


def _by_mass(mass: Float64[Tensor, " experts"]) -> Int64[Tensor, " experts"]:
    """Lists the experts, the heaviest first."""
    return mass.argsort(descending=True, stable=True)
