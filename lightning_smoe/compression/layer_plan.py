"""What becomes of the experts of one layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from lightning_smoe.errors import InputError
from lightning_smoe.functional.router import Grouping, RouterRepair
from lightning_smoe.models.layer import MoELayer


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What becomes of the experts of one layer.

    Args:
        name: The layer, such as `model.layers.3.mlp`.
        num_experts: Experts before.
        groups: Experts of each slot after; a pruned layer has one expert a slot.
        dropped: Experts that are in no slot.
        weights: Share of each expert in the slot it is in, at least 0; equal shares if none.
        super_experts: Experts of huge outputs that the planner left as they are; for the reader.
    """

    name: str
    num_experts: int
    groups: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...] = ()
    weights: Float64[Tensor, " experts"] | None = None
    super_experts: tuple[int, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether the layer stays as it is."""
        return self.groups == tuple((e,) for e in range(self.num_experts))

    @property
    def grouping(self) -> Grouping:
        """Slot and share of every expert."""
        assignment = torch.full((self.num_experts,), -1)
        for slot, members in enumerate(self.groups):
            assignment[list(members)] = slot
        weights = self.weights
        if weights is None:
            weights = torch.ones(self.num_experts, dtype=torch.float64)
        return Grouping(assignment, weights)

    def check(self, layer: MoELayer, router: RouterRepair) -> None:
        """Compares with the layer it is for.

        Args:
            layer: The layer.
            router: How the router will follow.

        Raises:
            InputError: The layer has another number of experts, an expert is in two places or in
                none, a slot is empty, a share is below 0, or the router needs more slots.
        """
        if layer.num_experts != self.num_experts:
            raise InputError(
                f"{self.name}: the plan is for {self.num_experts} experts and the model has "
                f"{layer.num_experts}; make a plan for this model"
            )
        placed = [*self.dropped, *(e for group in self.groups for e in group)]
        for expert in sorted({*placed, *range(self.num_experts)}):
            times = placed.count(expert)
            if times != 1 or not 0 <= expert < self.num_experts:
                raise InputError(
                    f"{self.name}: the plan names expert {expert} {times} times; name each of 0 to "
                    f"{self.num_experts - 1} once, in one group or in dropped"
                )
        if not all(self.groups):
            raise InputError(f"{self.name}: the plan has an empty group; remove it")
        shares = torch.ones(self.num_experts) if self.weights is None else self.weights
        if len(shares) != self.num_experts or not bool((shares >= 0).all()):
            raise InputError(
                f"{self.name}: plan.safetensors must give {self.num_experts} shares of 0 or more"
            )
        if router.keeps_all_rows:
            if self.dropped:
                raise InputError(
                    f"{self.name}: the plan drops experts {list(self.dropped)}, but under the "
                    f"router {type(router).__name__} every row needs a slot; put them in groups"
                )
            return
        if len(self.groups) < layer.top_k:
            raise InputError(
                f"{self.name}: the plan keeps {len(self.groups)} experts but the router selects "
                f"top_k={layer.top_k}; keep at least {layer.top_k}"
            )
        self._check_router_groups(layer)

    def _check_router_groups(self, layer: MoELayer) -> None:
        blocks = layer.num_router_groups
        if blocks == 1:
            return
        size, width = self.num_experts // blocks, len(self.groups) // blocks
        wrong = [
            g for i, g in enumerate(self.groups) if {e // size for e in g} != {i // max(width, 1)}
        ]
        if len(self.groups) % blocks or wrong or width < layer.min_experts_per_router_group:
            raise InputError(
                f"{self.name}: the router chooses among {blocks} equal blocks of experts; keep the "
                f"same number (at least {layer.min_experts_per_router_group}) in each block of "
                f"{size}, in order, and merge within blocks only"
            )
