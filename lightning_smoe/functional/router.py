"""The router's rows after experts were dropped or merged."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
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

    @property
    def joined(self) -> Float[Tensor, "experts features"]:
        """The rows with the bias, where there is one, as their last column."""
        return self.weight if self.bias is None else torch.cat([self.weight, self.bias[:, None]], 1)

    def like(self, joined: Float[Tensor, "groups features"]) -> "RouterRows":
        """Takes joined rows apart, with a bias if these rows have one."""
        if self.bias is None:
            return RouterRows(joined, None)
        return RouterRows(joined[:, :-1], joined[:, -1])

    def mixed(self, mixing: Float64[Tensor, "groups experts"]) -> "RouterRows":
        """Adds up rows, each with its weight."""
        matrix = mixing.to(self.weight.device)
        bias = None if self.bias is None else (matrix @ self.bias.double()).to(self.bias.dtype)
        return RouterRows((matrix @ self.weight.double()).to(self.weight.dtype), bias)


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

    @property
    def sizes(self) -> Int64[Tensor, " groups"]:
        """Number of experts in each slot."""
        return torch.bincount(self.assignment[self.assignment >= 0])

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


@dataclass(frozen=True, eq=False)
class RouterBatch:
    """What the original router makes of one batch: the same tokens, in the same order, twice.

    Args:
        states: What the rows multiply, in the compressed model.
        logits: Raw scores that the original rows give these states.
        teacher_logits: Raw scores that they gave the original model's states.
    """

    states: Float[Tensor, "tokens hidden"]
    logits: Float[Tensor, "tokens experts"]
    teacher_logits: Float[Tensor, "tokens experts"]


@dataclass(frozen=True, eq=False)
class RouterTokens:
    """Calibration tokens of one layer, and the way to sum over processes.

    Args:
        batches: This process's batches; read once, so they may be made while they are read.
        reduce: Sum of a tensor over processes, which all call it equally often.
    """

    batches: Iterable[RouterBatch]
    reduce: Callable[[Tensor], Tensor]


class RouterRepair(ABC):
    """New router rows for the slots.

    Attributes:
        needs_tokens: Whether it is fitted on calibration tokens.
        needs_bias: Whether slots of several experts need a router bias; other families are refused.
        keeps_heaviest: Whether a slot answers as its heaviest member alone, also where experts are
            selected; otherwise selection biases are averaged by share.
        keeps_all_rows: Whether the router stays as it is, several rows share a slot, and `__call__`
            is not used.
    """

    needs_tokens: ClassVar[bool]
    needs_bias: ClassVar[bool] = False
    keeps_heaviest: ClassVar[bool] = False
    keeps_all_rows: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self, rows: RouterRows, grouping: Grouping, tokens: RouterTokens | None
    ) -> RouterRows:
        """Finds the rows.

        Args:
            rows: The original rows.
            grouping: Which experts share a slot.
            tokens: What the rows are fitted on; none if not needed.

        Raises:
            ValueError: There are no tokens and they are needed.
        """


@dataclass(frozen=True)
class Slice(RouterRepair):
    """Keeps the row of each slot's heaviest member.

    For pruning that is the kept expert's own row. For merging it is the row of the group's centre,
    as in REAM (https://arxiv.org/abs/2604.04356), if shares are the saliency that chose the
    centres. Among members of equal share the first expert is the heaviest.
    """

    needs_tokens: ClassVar[bool] = False
    keeps_heaviest: ClassVar[bool] = True

    def __call__(
        self, rows: RouterRows, grouping: Grouping, tokens: RouterTokens | None
    ) -> RouterRows:
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

    def __call__(
        self, rows: RouterRows, grouping: Grouping, tokens: RouterTokens | None
    ) -> RouterRows:
        equal = Grouping(grouping.assignment, torch.ones_like(grouping.weights))
        return rows.mixed(equal.mixing())


@dataclass(frozen=True)
class LogSumExp(RouterRepair):
    """Fits each slot's row to the log of its members' summed exponentials, by ridge regression.

    `argmin_w sum_x (w x - log sum_{j in slot} exp(l_j(x)))^2 + lam ||w - mean row||^2` on the
    calibration tokens: the slot answers to the sum of its members' gates. With sigmoid scores it
    is the limit of small gates: two members of logit 0 had gates of 0.5 each, and the slot gets
    2/3 where the sum is 1. A slot of one keeps its row.

    Args:
        strength: lam relative to the mean energy of a feature, at least 1e-6.
    """

    needs_tokens: ClassVar[bool] = True
    strength: float = 1e-3

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def __call__(
        self, rows: RouterRows, grouping: Grouping, tokens: RouterTokens | None
    ) -> RouterRows:
        if tokens is None:
            raise ValueError("LogSumExp is fitted on calibration tokens and got none")
        pairs = ((batch.states, batch.logits) for batch in tokens.batches)
        fitted = ridge_rows(rows, grouping, pairs, strength=self.strength, reduce=tokens.reduce)
        single = (grouping.sizes == 1).to(rows.weight.device)
        start = MeanRows()(rows, grouping, None).joined
        return rows.like(torch.where(single[:, None], start, fitted.joined))


def ridge_rows(
    rows: RouterRows,
    grouping: Grouping,
    pairs: Iterable[tuple[Tensor, Tensor]],
    *,
    strength: float,
    reduce: Callable[[Tensor], Tensor],
) -> RouterRows:
    """Fits rows to the logits that the slots should get, shrunk toward the members' mean row.

    Args:
        rows: The original rows.
        grouping: Which experts share a slot.
        pairs: For each batch of this process, states and the members' logits; read once.
        strength: Shrinkage relative to the mean energy of a feature, above 0.
        reduce: Sum of a tensor over processes.
    """
    start = MeanRows()(rows, grouping, None).joined
    moments = Moments.zeros(start.shape[1], grouping.num_groups, start.device)
    for states, logits in pairs:
        features = router_features(states, rows.bias is not None)
        moments.add(features, router_targets(logits, grouping))
    moments = moments.reduced(reduce)
    return rows.like(ridge_toward(start, moments.gram, moments.cross, strength))


def router_features(
    states: Float[Tensor, "tokens hidden"], has_bias: bool
) -> Float[Tensor, "tokens features"]:
    """What the joined rows multiply: the states, and a one where there is a bias."""
    return torch.cat([states, states.new_ones(len(states), 1)], dim=1) if has_bias else states


def router_targets(
    router_logits: Float[Tensor, "tokens experts"], grouping: Grouping
) -> Float[Tensor, "tokens groups"]:
    """The logits that the slots should get."""
    assignment = grouping.assignment.to(router_logits.device)
    return log_sum_exp_targets(router_logits, assignment, grouping.num_groups)
