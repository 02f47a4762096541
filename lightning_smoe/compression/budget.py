"""How many experts each layer keeps: equally many, or more where they count for more."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn.functional import normalize

from lightning_smoe.compression.planner import (
    experts_to_keep,
    least_experts,
    router_blocks,
    total_to_keep,
)
from lightning_smoe.compression.trials import Trials
from lightning_smoe.errors import InputError
from lightning_smoe.functional.allocation import (
    Counts,
    Limits,
    cheapest_counts,
    dropped_saliency,
    even_counts,
    greedy_counts,
)
from lightning_smoe.functional.clustering import Clusterer
from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.kmeans import KMeans
from lightning_smoe.functional.router import RouterRepair
from lightning_smoe.functional.saliency import GateMass, Reap, Saliency
from lightning_smoe.models.layer import MoELayer

logger = logging.getLogger(__name__)


class Budget(ABC):
    """Shares the experts that stay out among the layers."""

    @abstractmethod
    def __call__(self, trials: Trials) -> dict[str, int]:
        """Decides how many experts each layer keeps.

        Args:
            trials: The layers, what is known of them, and what they would be with fewer experts.

        Returns:
            Experts to keep, by the layer's name.
        """

    @abstractmethod
    def limits(self, layers: Sequence[MoELayer], keep: int | float, router: RouterRepair) -> Limits:
        """Numbers of experts that it may choose among, known before any work.

        Args:
            layers: The layers to change.
            keep: A fraction of all experts, in (0, 1] and not whole, or a count a layer.
            router: How the router will follow.

        Raises:
            InputError: The layers cannot keep so few or so many.
        """


@dataclass(frozen=True)
class Bounds:
    """Numbers of experts that one layer may keep, whatever the budget.

    A layer always keeps what its router selects and needs, and equally many in each of its groups;
    one under a router that keeps all its rows keeps one expert at least. All layers together keep
    `model.keep` of their experts exactly, or, where that cannot be had in such steps, the largest
    number below it that can.

    Args:
        round_to: Numbers are multiples of this, as expert parallelism likes them; at least 1.
        min_keep: Fraction of its experts that a layer keeps at least, in [0, 1].
    """

    round_to: int = 1
    min_keep: float = 0.0

    def __post_init__(self) -> None:
        if self.round_to < 1:
            raise ValueError(f"round_to={self.round_to} is no step; take 1 or more")
        if not 0 <= self.min_keep <= 1:
            raise ValueError(f"min_keep={self.min_keep} is no fraction; take one from 0 to 1")

    def limits(self, layers: Sequence[MoELayer], keep: int | float, router: RouterRepair) -> Limits:
        """Limits of layers that keep different numbers.

        Raises:
            InputError: The layers cannot keep so few or so many.
        """
        allowed = [self._allowed(layer, router) for layer in layers]
        total = total_to_keep(keep, layers)
        try:
            return Limits.within(allowed, total)
        except ValueError as error:
            raise InputError(
                f"model.keep={keep}: {error}; raise model.keep, or lower the bounds of model.budget"
            ) from error

    def _allowed(self, layer: MoELayer, router: RouterRepair) -> range:
        step = math.lcm(self.round_to, router_blocks(layer, router))
        least = max(least_experts(layer, router), math.ceil(self.min_keep * layer.num_experts), 1)
        allowed = range(-(-least // step) * step, layer.num_experts + 1, step)
        if not allowed:
            raise InputError(
                f"model.budget: {layer.name} has {layer.num_experts} experts and needs {least}, "
                f"between which there is no multiple of {step}; lower round_to"
            )
        return allowed


@dataclass(frozen=True)
class Uniform(Budget):
    """Every layer keeps the same fraction of its experts, or the same number."""

    def __call__(self, trials: Trials) -> dict[str, int]:
        router = trials.recipe.execution.router
        return {x.name: experts_to_keep(trials.keep, x, router) for x in trials.layers}

    def limits(self, layers: Sequence[MoELayer], keep: int | float, router: RouterRepair) -> Limits:
        counts = [experts_to_keep(keep, layer, router) for layer in layers]
        return Limits(tuple(range(count, count + 1) for count in counts), sum(counts))


@dataclass(frozen=True)
class GlobalRank(Budget):
    """As many of each layer as are among the experts of highest saliency in all layers.

    Which experts stay, the recipe decides. Saliencies of different layers are only comparable as
    far as the criterion is; they are not measured errors, and the result may be worse than uniform.

    Args:
        saliency: How much its layer would miss an expert.
        normalize: Divide saliencies by their mean over the layer.
        bounds: Numbers that a layer may keep.
    """

    saliency: Saliency = Reap()
    normalize: bool = True
    bounds: Bounds = Bounds()

    def __call__(self, trials: Trials) -> dict[str, int]:
        limits = self.limits(trials.layers, trials.keep, trials.recipe.execution.router)
        if limits.leave_no_choice:
            return named(trials.layers, even_counts([x.num_experts for x in trials.layers], limits))
        costs = []
        for layer, numbers in zip(trials.layers, limits.allowed, strict=True):
            scores = self.saliency(trials.evidence(layer)).double().cpu()
            if self.normalize:
                scores = scores / scores.mean().clamp(min=torch.finfo(scores.dtype).tiny)
            blocks = router_blocks(layer, trials.recipe.execution.router)
            costs.append(dropped_saliency(scores, numbers, blocks))
        return named(trials.layers, cheapest_counts(costs, limits))

    def limits(self, layers: Sequence[MoELayer], keep: int | float, router: RouterRepair) -> Limits:
        return self.bounds.limits(layers, keep, router)


@dataclass(frozen=True)
class GroupGreedy(Budget):
    """Neighbouring layers share their experts by how tightly these cluster (Sub-MoE).

    Sub-MoE (https://arxiv.org/abs/2506.23266) clusters two neighbouring layers together and says
    no more; this is the reading in the only public code, that of REAP
    (https://github.com/CerebrasResearch/reap). The cost of k experts is
    `sum_j ||y_j - center(j)||`, with y_j the mean output of expert j at length one and its center
    that of its group among k. Experts go one at a time from the layer of the group whose cost after
    it is the lowest. Never across layers, and blind to how much an expert is used.

    Args:
        num_layers: Neighbouring layers that share a budget, at least 1; 1 is uniform.
        clusterer: What groups the experts for the cost; the recipe groups them anew.
        bounds: Numbers that a layer may keep.
    """

    num_layers: int = 2
    clusterer: Clusterer = KMeans(num_starts=1)
    bounds: Bounds = Bounds()

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers={self.num_layers} makes no group; take 1 or more")

    def __call__(self, trials: Trials) -> dict[str, int]:
        limits = self.limits(trials.layers, trials.keep, trials.recipe.execution.router)
        even = even_counts([layer.num_experts for layer in trials.layers], limits)
        counts: list[int] = []
        for start in range(0, len(even), self.num_layers):
            place = slice(start, start + self.num_layers)
            shared = Limits(limits.allowed[place], sum(even[place]))
            if shared.leave_no_choice:
                counts += even[place]
                continue
            layers = zip(trials.layers[place], shared.allowed, strict=True)
            costs = [self._costs(trials.evidence(layer), numbers) for layer, numbers in layers]
            counts += greedy_counts(costs, shared)
        return named(trials.layers, tuple(counts))

    def limits(self, layers: Sequence[MoELayer], keep: int | float, router: RouterRepair) -> Limits:
        return self.bounds.limits(layers, keep, router)

    def _costs(self, evidence: Evidence, numbers: range) -> Float64[Tensor, " choices"]:
        points = normalize(evidence.output_sums.plain.double().cpu())
        distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        distance = ((distance + distance.mT) / 2).fill_diagonal_(0)
        mass = GateMass()(evidence).double().cpu()
        costs = []
        for number in numbers:
            labels = self.clusterer(distance, mass, number)
            sums = torch.zeros(number, points.shape[1], dtype=points.dtype)
            sums = sums.index_add_(0, labels, points)
            centers = sums / labels.bincount(minlength=number)[:, None]
            costs.append((points - centers[labels]).norm(dim=1).sum())
        return torch.stack(costs)


def named(layers: Sequence[MoELayer], counts: Counts) -> dict[str, int]:
    """Counts by the layer's name."""
    return {layer.name: count for layer, count in zip(layers, counts, strict=True)}


@torch.no_grad()
def share_out(budget: Budget, trials: Trials) -> dict[str, int]:
    """Runs a budget, and says how many experts each layer keeps.

    Args:
        budget: The budget.
        trials: The layers, what is known of them, and what they would be with fewer experts.
    """
    counts = budget(trials)
    total = sum(layer.num_experts for layer in trials.layers)
    kept = ", ".join(f"{layer.index}: {counts[layer.name]}" for layer in trials.layers)
    logger.info("plan: %d of %d experts stay, by layer %s", sum(counts.values()), total, kept)
    return counts
