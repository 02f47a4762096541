"""The router's rows after experts were dropped or merged."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lightning_smoe.functional.moments import Moments
from lightning_smoe.functional.refit import check_strength, log_sum_exp_targets, ridge_toward


@dataclass(frozen=True, eq=False)
class RouterRows:
    """The rows that give the logits: `weight x + bias`.

    Args:
        weight: One row an expert.
        bias: One number an expert, where the family has it.
    """

    weight: Float[Tensor, "experts hidden"]
    bias: Float[Tensor, " experts"] | None


@dataclass(frozen=True, eq=False)
class Grouping:
    """Which experts share a slot.

    Args:
        assignment: Slot of each expert; -1 for one that was dropped.
        weights: Share of each expert within its slot, at least 0.
    """

    assignment: Int64[Tensor, " experts"]
    weights: Float64[Tensor, " experts"]

    @property
    def num_groups(self) -> int:
        """Number of slots."""
        return int(self.assignment.max()) + 1

    def members(self, group: int) -> Int64[Tensor, " members"]:
        """Experts of one slot."""
        return (self.assignment == group).nonzero().squeeze(1)

    def mixing(self) -> Float64[Tensor, "groups experts"]:
        """Share of every expert in every slot; rows sum to one."""
        matrix = torch.zeros(self.num_groups, len(self.weights), dtype=torch.float64)
        for group in range(self.num_groups):
            members = self.members(group)
            share = self.weights[members].cpu()
            total = share.sum()
            matrix[group, members.cpu()] = share / total if total > 0 else 1 / len(members)
        return matrix


class RouterRepair(ABC):
    """New router rows for the slots.

    Attributes:
        needs_tokens: Whether it is fitted on calibration tokens.
        keeps_heaviest: Whether a slot answers as its heaviest member alone, also where experts are
            selected; otherwise selection biases are averaged by share.
    """

    needs_tokens: ClassVar[bool]
    keeps_heaviest: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, rows: RouterRows, grouping: Grouping, moments: Moments | None) -> RouterRows:
        """Finds the rows.

        Args:
            rows: The original rows.
            grouping: Which experts share a slot.
            moments: Products of `router_features` and `router_targets`; none if not needed.
        """


@dataclass(frozen=True)
class Slice(RouterRepair):
    """Keeps the row of each slot's heaviest member.

    For pruning that is the kept expert's own row; for merging, the row of the group's centre
    (REAM, https://arxiv.org/abs/2604.04356).
    """

    needs_tokens: ClassVar[bool] = False
    keeps_heaviest: ClassVar[bool] = True

    def __call__(self, rows: RouterRows, grouping: Grouping, moments: Moments | None) -> RouterRows:
        heaviest = grouping.mixing().argmax(1).to(rows.weight.device)
        bias = None if rows.bias is None else rows.bias[heaviest]
        return RouterRows(rows.weight[heaviest], bias)


@dataclass(frozen=True)
class MeanRows(RouterRepair):
    """Averages the members' rows without weights.

    A slot then gets the mean of its members' logits where it should get the log of the sum of their
    exponentials, so it is chosen too rarely. For comparison; `LogSumExp` has no such fault.
    """

    needs_tokens: ClassVar[bool] = False

    def __call__(self, rows: RouterRows, grouping: Grouping, moments: Moments | None) -> RouterRows:
        equal = Grouping(grouping.assignment, torch.ones_like(grouping.weights))
        mean = equal.mixing().to(rows.weight.device)
        bias = None if rows.bias is None else (mean @ rows.bias.double()).to(rows.bias.dtype)
        return RouterRows((mean @ rows.weight.double()).to(rows.weight.dtype), bias)


@dataclass(frozen=True)
class LogSumExp(RouterRepair):
    """Fits each slot's row to the log of its members' summed exponentials, by ridge regression.

    `argmin_w sum_x (w x - log sum_{j in slot} exp(l_j(x)))^2 + lam ||w - mean row||^2` on the
    calibration tokens: the slot answers to the sum of its members' gates. With sigmoid scores it
    is the limit of small gates. A slot of one keeps its row.

    Args:
        strength: lam relative to the mean energy of a feature, at least 1e-6.
    """

    needs_tokens: ClassVar[bool] = True
    strength: float = 1e-3

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def __call__(self, rows: RouterRows, grouping: Grouping, moments: Moments | None) -> RouterRows:
        if moments is None:
            raise ValueError("LogSumExp is fitted on calibration tokens and got none")
        start = MeanRows()(rows, grouping, None)
        features = start.weight
        if start.bias is not None:
            features = torch.cat([start.weight, start.bias[:, None]], dim=1)
        fitted = ridge_toward(features, moments.gram, moments.cross, self.strength)
        size = start.weight.shape[1]
        members = torch.bincount(grouping.assignment[grouping.assignment >= 0])
        single = (members == 1).to(start.weight.device)
        weight = torch.where(single[:, None], start.weight, fitted[:, :size])
        bias = None if start.bias is None else torch.where(single, start.bias, fitted[:, size])
        return RouterRows(weight, bias)


def router_features(
    states: Float[Tensor, "tokens hidden"], has_bias: bool
) -> Float[Tensor, "tokens features"]:
    """What the rows multiply: the states, and a one where there is a bias."""
    return torch.cat([states, states.new_ones(len(states), 1)], dim=1) if has_bias else states


def router_targets(
    router_logits: Float[Tensor, "tokens experts"], grouping: Grouping
) -> Float[Tensor, "tokens groups"]:
    """The logits that the slots should get."""
    assignment = grouping.assignment.to(router_logits.device)
    return log_sum_exp_targets(router_logits, assignment, grouping.num_groups)
