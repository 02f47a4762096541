"""How slots are chosen and filled: prune by a saliency, or merge by a clustering."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from lightning_smoe.functional.clustering import Clusterer, GateMassWard
from lightning_smoe.functional.distance import Distance, Output
from lightning_smoe.functional.merging import Average, Merger
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import LogSumExp, RouterRepair, Slice
from lightning_smoe.functional.saliency import Frequency, Reap, Saliency
from lightning_smoe.functional.sums import ExpertSums

Assignment = Int64[Tensor, " experts"]


class Recipe(ABC):
    """A method of compression: which experts share a slot, and what the slot holds."""

    @abstractmethod
    def __call__(
        self, sums: ExpertSums, blocks: Int64[Tensor, " experts"], num_groups: int
    ) -> tuple[Assignment, Float64[Tensor, " experts"]]:
        """Decides for one layer.

        Args:
            sums: The layer's sums, without a domain axis.
            blocks: The router's block of each expert (all 0 where it has none); each block keeps
                the same number of slots and shares none.
            num_groups: Slots to leave.

        Returns:
            Slot of each expert (-1 = dropped), and its share in the slot.
        """

    @property
    @abstractmethod
    def needs_all_experts(self) -> bool:
        """Whether calibration must run every expert on every token."""

    @property
    @abstractmethod
    def execution(self) -> tuple[RouterRepair, Merger, bool, Refit | None]:
        """Router repair, merger, whether to align neurons first, and refit."""


@dataclass(frozen=True)
class Prune(Recipe):
    """Keeps the experts of highest saliency with their router rows; drops the others.

    Args:
        saliency: What a layer would miss of an expert.
        refit: Closed-form refit of the kept experts and the shared expert; null leaves it out.
    """

    saliency: Saliency = Reap()
    refit: Refit | None = Refit()

    def __call__(
        self, sums: ExpertSums, blocks: Int64[Tensor, " experts"], num_groups: int
    ) -> tuple[Assignment, Float64[Tensor, " experts"]]:
        scores = self.saliency(sums)
        assignment = torch.full_like(blocks, -1)
        each = num_groups // int(blocks.max() + 1)
        kept = []
        for block in blocks.unique():
            members = (blocks == block).nonzero().squeeze(1)
            # Stable: of equal scores the lower index stays, on every machine.
            order = scores[members].argsort(descending=True, stable=True)
            kept += members[order[:each]].sort().values.tolist()
        assignment[kept] = torch.arange(len(kept))
        return assignment, torch.ones_like(scores)

    @property
    def needs_all_experts(self) -> bool:
        """A saliency needs routed tokens only."""
        return False

    @property
    def execution(self) -> tuple[RouterRepair, Merger, bool, Refit | None]:
        """Rows are kept as they are, and nothing is merged."""
        return Slice(), Average(), False, self.refit


@dataclass(frozen=True)
class Merge(Recipe):
    """Clusters experts and puts one merged expert in the place of each group.

    Args:
        distance: How far two experts are apart.
        clusterer: How groups follow from distances.
        weights: Share of each member in its group, by this criterion; null gives equal shares.
        merger: How the members become one expert.
        align: Match the members' neurons to the heaviest member's before merging.
        router: How the router's rows follow.
        refit: Closed-form refit of the merged experts and the shared expert; null leaves it out.
    """

    distance: Distance = Output()
    clusterer: Clusterer = GateMassWard()
    weights: Saliency | None = Frequency()
    merger: Merger = Average()
    align: bool = True
    router: RouterRepair = LogSumExp()
    refit: Refit | None = Refit()

    def __call__(
        self, sums: ExpertSums, blocks: Int64[Tensor, " experts"], num_groups: int
    ) -> tuple[Assignment, Float64[Tensor, " experts"]]:
        distance = self.distance(sums)
        assignment = torch.full_like(blocks, -1)
        each = num_groups // int(blocks.max() + 1)
        for number, block in enumerate(blocks.unique()):
            members = (blocks == block).nonzero().squeeze(1)
            within = distance[members][:, members]
            labels = self.clusterer(within, sums.gate_sum[members], each)
            assignment[members] = labels + number * each
        shares = None if self.weights is None else self.weights(sums)
        return assignment, torch.ones_like(sums.gate_sum) if shares is None else shares

    @property
    def needs_all_experts(self) -> bool:
        """As the distance says."""
        return self.distance.needs_all_experts

    @property
    def execution(self) -> tuple[RouterRepair, Merger, bool, Refit | None]:
        """As set."""
        return self.router, self.merger, self.align, self.refit
