"""Labels of a partition of experts: how they are numbered, and what every partition must hold."""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

# Mass of an expert that no token visits, relative to the heaviest: far below one token in any
# calibration set, so it costs nothing to merge, and far above zero, so no share divides by zero.
_MASS_FLOOR = 1e-12


def check_num_groups(num_groups: int, num_experts: int) -> None:
    """Refuses numbers of groups that experts cannot form.

    Raises:
        ValueError: There are no groups, or more groups than experts.
    """
    if not 1 <= num_groups <= num_experts:
        raise ValueError(
            f"num_groups={num_groups} is impossible with {num_experts} experts; "
            f"take 1 to {num_experts}"
        )


def numbered(labels: Int64[Tensor, " experts"]) -> Int64[Tensor, " experts"]:
    """Renumbers groups by first appearance."""
    listed = labels.tolist()
    number = {label: index for index, label in enumerate(dict.fromkeys(listed))}
    return torch.tensor([number[label] for label in listed], device=labels.device)


def canonical_order(distance: Float64[Tensor, "experts experts"]) -> Int64[Tensor, " experts"]:
    """Lists the experts in an order that only their distances decide, the most central first.

    For what goes by position, such as seeds and ties: in this order it does not depend on how the
    experts were numbered.
    """
    # Sorted before they are summed: rounding must not depend on the numbering either.
    return distance.sort(dim=1).values.sum(1).argsort(stable=True)


def fill_empty_groups(
    labels: Int64[Tensor, " experts"],
    distance: Float64[Tensor, "experts experts"],
    num_groups: int,
) -> Int64[Tensor, " experts"]:
    """Gives each empty group the member of the largest group that lies farthest from its mates."""
    labels = labels.clone()
    for group in range(num_groups):
        sizes = labels.bincount(minlength=num_groups)
        if sizes[group] == 0:
            members = (labels == sizes.argmax()).nonzero().squeeze(1)
            spread = distance[members][:, members].sum(1)
            labels[members[spread.argmax()]] = group
    return labels


def positive_mass(mass: Float64[Tensor, " experts"]) -> Float64[Tensor, " experts"]:
    """Scales masses to at most one, and lifts those of zero just above it; none at all is equal."""
    heaviest = mass.max()
    return (mass / heaviest).clamp(min=_MASS_FLOOR) if heaviest > 0 else torch.ones_like(mass)
