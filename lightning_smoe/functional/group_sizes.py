"""Groups of limited size, made from any partition by reassigning experts to its medoids."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from lightning_smoe.functional.partition import canonical_order, numbered


@dataclass(frozen=True)
class GroupSizes:
    """How many experts a group may hold.

    Args:
        smallest: Fewest, at least 1.
        largest: Most.
    """

    smallest: int
    largest: int

    @staticmethod
    def equal(num_experts: int, num_groups: int) -> "GroupSizes":
        """Sizes that differ by at most one."""
        return GroupSizes(num_experts // num_groups, -(-num_experts // num_groups))


def fit_group_sizes(
    labels: Int64[Tensor, " experts"],
    distance: Float64[Tensor, "experts experts"],
    sizes: GroupSizes,
) -> Int64[Tensor, " experts"]:
    """Reassigns experts so that every group keeps to the sizes; one that does already is kept.

    Minimises `sum_i d(i, medoid of its group)` by turns: given the medoids, the best assignment to
    the free places of their groups (linear sum assignment); given the groups, the best medoids.
    Each turn lowers the sum, so it ends, at a local minimum. A medoid stays with its group, which
    costs nothing where the triangle inequality holds.

    Args:
        labels: Groups, numbered from zero, none empty.
        distance: Distances between experts.
        sizes: What to keep to; the experts must fit.

    Returns:
        Group of each expert, numbered by first appearance.
    """
    held = labels.bincount()
    if sizes.smallest <= held.min() and held.max() <= sizes.largest:
        return labels
    # Two experts are equally good medoids of each other: the more central one has to be first.
    order = canonical_order(distance)
    moved = torch.empty_like(labels)
    moved[order] = _reassign(numbered(labels[order]), distance[order][:, order], sizes)
    return numbered(moved)


def _reassign(
    labels: Int64[Tensor, " experts"],
    distance: Float64[Tensor, "experts experts"],
    sizes: GroupSizes,
) -> Int64[Tensor, " experts"]:
    """Takes medoids and assignments by turns, as long as it helps."""
    best = torch.inf
    while True:
        medoids = _medoids(labels, distance)
        moved = _assign(distance, medoids, sizes)
        total = float(distance.gather(1, medoids[moved].unsqueeze(1)).sum())
        if total >= best:
            return labels
        labels, best = moved, total


def _medoids(
    labels: Int64[Tensor, " experts"], distance: Float64[Tensor, "experts experts"]
) -> Int64[Tensor, " groups"]:
    """Finds the expert of each group that is nearest to its mates."""
    together = labels.unsqueeze(0) == labels.unsqueeze(1)
    spread = torch.where(together, distance, 0.0).sum(1)
    groups = torch.arange(int(labels.max()) + 1, device=labels.device)
    inside = groups.unsqueeze(1) == labels.unsqueeze(0)
    return torch.where(inside, spread, torch.inf).argmin(1)


def _assign(
    distance: Float64[Tensor, "experts experts"],
    medoids: Int64[Tensor, " groups"],
    sizes: GroupSizes,
) -> Int64[Tensor, " experts"]:
    """Gives every expert the place, in a group of some medoid, that makes the sum smallest."""
    num_experts, num_groups = len(distance), len(medoids)
    stays = torch.zeros(num_experts, dtype=torch.bool, device=distance.device)
    stays[medoids] = True
    movers = (~stays).nonzero().squeeze(1)
    # One place beside each medoid is taken, and no group can get more than all who move.
    places = min(sizes.largest - 1, len(movers))
    cost = distance[movers][:, medoids].repeat_interleave(places, dim=1)
    if sizes.smallest > 1:
        # Places that may stay free are filled by blanks; the others cost a blank too much.
        optional = torch.arange(places, device=distance.device) >= sizes.smallest - 1
        blank = torch.where(optional.repeat(num_groups), 0.0, torch.inf).to(cost)
        cost = torch.cat([cost, blank.expand(cost.shape[1] - len(movers), -1)])
    from scipy.optimize import linear_sum_assignment

    _, chosen = linear_sum_assignment(cost.numpy(force=True))
    labels = torch.empty_like(stays, dtype=torch.int64)
    labels[medoids] = torch.arange(num_groups, device=distance.device)
    taken = torch.tensor(chosen[: len(movers)].tolist(), dtype=torch.int64)
    labels[movers] = taken.to(distance.device) // max(places, 1)
    return labels
