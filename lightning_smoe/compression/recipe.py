"""How slots are chosen and filled: prune by a saliency, or merge groups of experts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.functional.alignment import Alignment
from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.grouping import Grouper
from lightning_smoe.functional.merging import Average, Merger
from lightning_smoe.functional.pooled_matching import PooledMatching
from lightning_smoe.functional.pooling import NeuronPool
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import RouterRepair, Slice
from lightning_smoe.functional.router_rows import Map
from lightning_smoe.functional.saliency import Reap, Saliency
from lightning_smoe.functional.scale import ScaleRepair
from lightning_smoe.models.layer import MoELayer
from lightning_smoe.models.mapped import check_mappable, is_mapped

Assignment = Int64[Tensor, " experts"]


@dataclass(frozen=True)
class Execution:
    """How slots are filled and the router follows.

    Args:
        router: How the router's rows follow.
        merger: How the members of a slot become one expert.
        alignment: How the members' neurons are matched before they are merged; none leaves them.
        refit: Closed-form refit afterwards; none leaves it out.
        scale: One number that gives the routed output its size back; none leaves it out.
    """

    router: RouterRepair = Slice()
    merger: Merger = Average()
    alignment: Alignment | None = None
    refit: Refit | None = None
    scale: ScaleRepair | None = None


class Recipe(ABC):
    """A method of compression: which experts share a slot, and what the slot holds."""

    @abstractmethod
    def __call__(
        self, evidence: Evidence, num_groups: int, single: Bool[Tensor, " experts"]
    ) -> tuple[Assignment, Float64[Tensor, " experts"]]:
        """Decides for the experts of one layer, or of one block of its router.

        Args:
            evidence: All that is known of them.
            num_groups: Slots to leave.
            single: Experts that stay as they are, each in a slot of its own.

        Returns:
            Slot of each expert (-1 = dropped), and its share in the slot.
        """

    @property
    @abstractmethod
    def execution(self) -> Execution:
        """How the plan is carried out."""

    @property
    @abstractmethod
    def protects_super_experts(self) -> bool:
        """Whether super experts stay as they are."""


@dataclass(frozen=True)
class Prune(Recipe):
    """Keeps the experts of highest saliency with their router rows; drops the others.

    Args:
        saliency: What a layer would miss of an expert.
        refit: Closed-form refit of the kept experts and the shared expert; null leaves it out.
        protect: Keep super experts, whatever their saliency.
        scale: One number a layer that gives the routed output its size back, before any refit,
            which includes it; null leaves it out.
    """

    saliency: Saliency = Reap()
    refit: Refit | None = Refit()
    protect: bool = True
    scale: ScaleRepair | None = None

    def __call__(
        self, evidence: Evidence, num_groups: int, single: Bool[Tensor, " experts"]
    ) -> tuple[Assignment, Float64[Tensor, " experts"]]:
        scores = self.saliency(evidence).double()
        # Stable: of equal scores the lower index stays, on every machine.
        order = torch.where(single, torch.inf, scores).argsort(descending=True, stable=True)
        kept = order[:num_groups].sort().values
        assignment = torch.full_like(kept, -1).new_full((len(scores),), -1)
        assignment[kept] = torch.arange(len(kept), device=kept.device)
        return assignment, torch.ones_like(scores)

    @property
    def execution(self) -> Execution:
        """Rows are kept as they are, and nothing is merged."""
        return Execution(refit=self.refit, scale=self.scale)

    @property
    def protects_super_experts(self) -> bool:
        """As set."""
        return self.protect


@dataclass(frozen=True)
class Merge(Recipe):
    """Puts one expert in the place of each group of experts.

    As it stands it is matched neuron pooling; see lightning_smoe/compression/README.md.

    Args:
        groups: Which experts share a slot.
        weights: Share of each member in its group, by this criterion; null gives equal shares.
        merger: How the members become one expert.
        alignment: How the members' neurons are matched to the heaviest member's before merging;
            null leaves them.
        router: How the router's rows follow.
        refit: Closed-form refit of the merged experts and the shared expert; null leaves it out.
        protect: Keep super experts as they are, whatever their group would be.
        scale: As of `Prune`.
    """

    groups: Grouper = PooledMatching()
    weights: Saliency | None = None
    merger: Merger = NeuronPool()
    alignment: Alignment | None = None
    router: RouterRepair = Map()
    refit: Refit | None = Refit()
    protect: bool = True
    scale: ScaleRepair | None = None

    def __call__(
        self, evidence: Evidence, num_groups: int, single: Bool[Tensor, " experts"]
    ) -> tuple[Assignment, Float64[Tensor, " experts"]]:
        shares = torch.ones(evidence.num_experts, dtype=torch.float64, device=single.device)
        if self.weights is not None:
            shares = self.weights(evidence).double()
        alone = single.nonzero().squeeze(1)
        # Where more experts are to stay alone than there are slots for, none is.
        if not 0 < len(alone) < num_groups:
            return self.groups(evidence, num_groups), shares
        others = (~single).nonzero().squeeze(1)
        assignment = torch.empty_like(others).new_empty(evidence.num_experts)
        assignment[others] = self.groups(evidence.select(others), num_groups - len(alone))
        assignment[alone] = torch.arange(num_groups - len(alone), num_groups, device=alone.device)
        return assignment, shares

    @property
    def execution(self) -> Execution:
        """As set."""
        return Execution(self.router, self.merger, self.alignment, self.refit, self.scale)

    @property
    def protects_super_experts(self) -> bool:
        """As set."""
        return self.protect


def check_router(router: RouterRepair, model: PreTrainedModel, layers: Sequence[MoELayer]) -> None:
    """Checks that the family can store what becomes of its router.

    Raises:
        InputError: It cannot.
    """
    if router.keeps_all_rows or is_mapped(model):
        check_mappable(model)
    apart = next((layer for layer in layers if layer.router_reads_apart), None)
    if router.needs_tokens and apart is not None:
        raise InputError(
            f"{type(router).__name__} is fitted on what the experts read, and the router of "
            f"{model.config.model_type} reads something else; set router to "
            "lightning_smoe.functional.router_rows.Map"
        )
    if router.needs_bias and not any(t.kind == "bias" for x in layers for t in x.router_tensors):
        raise InputError(
            f"{type(router).__name__} needs routers with a bias, which {model.config.model_type} "
            "has not; set router to lightning_smoe.functional.router.LogSumExp"
        )
