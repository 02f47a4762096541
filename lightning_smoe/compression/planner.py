"""From statistics, weights and a recipe to a plan."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.compression.layer_plan import LayerPlan
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.recipe import Recipe
from lightning_smoe.errors import InputError
from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.router import RouterRepair
from lightning_smoe.functional.sums import ExpertSums
from lightning_smoe.functional.super_experts import super_experts
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.layer import MoELayer

logger = logging.getLogger(__name__)

# Gives a layer its weights for a while.
Hold = Callable[[MoELayer], AbstractContextManager[Any]]

# Part of the layers that may have super experts, as in REAP's code: behind it no attention is left
# that would rely on them.
_DEPTH = 0.75


def experts_to_keep(keep: int | float, layer: MoELayer, router: RouterRepair) -> int:
    """Number of experts that a layer keeps.

    Args:
        keep: A fraction of the layer's experts, in (0, 1] and not whole, or a count; 1.0 is all.
        layer: The layer.
        router: How the router will follow; one that keeps all its rows needs no slot for each
            expert that it selects.

    Raises:
        InputError: It is no number, above the count, or below what the router selects or needs.
    """
    count = round(_asked(keep, layer))
    if router.keeps_all_rows:
        return max(count, 1)
    floor = least_experts(layer, router)
    if count < floor:
        raise InputError(
            f"model.keep={keep} keeps {count} experts in {layer.name} but the router "
            f"(top_k={layer.top_k}, {layer.num_router_groups} groups) needs {floor}; "
            f"raise model.keep to {floor} or more"
        )
    if count % layer.num_router_groups:
        blocks = layer.num_router_groups
        raise InputError(
            f"model.keep={keep} keeps {count} experts in {layer.name}, whose router has {blocks} "
            f"groups of equal size; keep a multiple of {blocks}, such as {count - count % blocks}"
        )
    return count


def total_to_keep(keep: int | float, layers: Sequence[MoELayer]) -> int:
    """Number of experts that layers keep together.

    Args:
        keep: A fraction of all experts, in (0, 1] and not whole, or a count a layer.
        layers: The layers.

    Raises:
        InputError: It is no number, or above a layer's count.
    """
    return round(sum(_asked(keep, layer) for layer in layers))


def least_experts(layer: MoELayer, router: RouterRepair) -> int:
    """Experts that a layer has to keep.

    Args:
        layer: The layer.
        router: How the router will follow; one that keeps all its rows needs no more than one.
    """
    if router.keeps_all_rows:
        return 1
    return max(layer.top_k, layer.num_router_groups * layer.min_experts_per_router_group)


def router_blocks(layer: MoELayer, router: RouterRepair) -> int:
    """Equal blocks of experts that must keep equally many and share no slot.

    Where the router keeps all its rows its groups keep theirs, whatever shares a slot: one block.

    Args:
        layer: The layer.
        router: How the router will follow.
    """
    return 1 if router.keeps_all_rows else layer.num_router_groups


def _asked(keep: int | float, layer: MoELayer) -> float:
    """Experts of a layer that are asked for, not yet rounded."""
    if not math.isfinite(keep) or keep <= 0:
        raise InputError(
            f"model.keep is {keep}; give a fraction in (0, 1] or a number of experts a layer"
        )
    if isinstance(keep, float) and keep <= 1:
        return keep * layer.num_experts
    if keep != int(keep):
        raise InputError(f"model.keep is {keep}; a number of experts must be whole")
    if keep > layer.num_experts:
        raise InputError(
            f"model.keep asks for {int(keep)} experts but {layer.name} has {layer.num_experts}"
        )
    return float(keep)


def select_layers(layers: Sequence[MoELayer], wanted: str | Sequence[int]) -> list[MoELayer]:
    """The layers that are to change.

    Args:
        layers: Every mixture-of-experts layer.
        wanted: `all`, or numbers of decoder layers counted from zero.

    Raises:
        InputError: A named decoder layer does not exist or has no experts, or nothing is named.
    """
    if wanted == "all":
        return list(layers)
    there = {layer.index: layer for layer in layers}
    if isinstance(wanted, str) or not wanted:
        raise InputError(f"model.layers is {wanted!r}; give 'all' or a list of layer indices")
    unknown = sorted(set(wanted) - there.keys())
    if unknown:
        raise InputError(
            f"model.layers names {unknown}, which have no experts; these have: {sorted(there)}"
        )
    return [there[index] for index in sorted(set(wanted))]


def evidence_of(layer: MoELayer, statistics: Statistics) -> Evidence:
    """Puts together all that is known of a layer.

    Args:
        layer: The layer of the original, with its weights.
        statistics: What its experts did on calibration text.

    Raises:
        InputError: The statistics are of another model.
    """
    if layer.name not in statistics.layers:
        raise InputError(f"the statistics have no layer {layer.name}; calibrate this model")
    device = layer.router_tensors[0].rows.device
    sums = {k: t.to(device) for k, t in statistics.layers[layer.name].pooled().tensors().items()}
    sample = statistics.samples[layer.name].to(device)
    return Evidence(ExpertSums(**sums), sample, layer.weights(), layer.activate)


@torch.no_grad()
def make_plan(
    statistics: Statistics,
    layers: Sequence[MoELayer],
    recipe: Recipe,
    counts: Mapping[str, int],
    *,
    manifest: Manifest | None = None,
    hold: Hold = nullcontext,
) -> CompressionPlan:
    """Decides what becomes of every expert.

    Args:
        statistics: What the experts did on calibration text.
        layers: Layers to change.
        recipe: The method.
        counts: Experts to keep, by the layer's name.
        manifest: What the plan is made from.
        hold: Gives a layer its weights for a while, if they are not always there.

    Raises:
        InputError: The statistics are of another model.
    """
    protected = protected_experts(statistics, recipe)
    plans = []
    for number, layer in enumerate(layers):
        start = time.monotonic()
        with hold(layer):
            evidence = evidence_of(layer, statistics)
            alone = protected[layer.name]
            plans.append(plan_layer(layer, evidence, recipe, counts[layer.name], alone=alone))
            del evidence  # It would keep the weights.
        logger.info(
            "plan: %s, %d -> %d experts in %.1f s; %d of %d layers", layer.name, layer.num_experts,
            counts[layer.name], time.monotonic() - start, number + 1, len(layers),
        )  # fmt: skip
    fingerprint = str(statistics.manifest.inputs.get("checkpoint", ""))
    return CompressionPlan(
        tuple(plans), **vars(recipe.execution), model=fingerprint, manifest=manifest
    )


def protected_experts(
    statistics: Statistics, recipe: Recipe
) -> dict[str, Bool[Tensor, " experts"]]:
    """Super experts that a recipe leaves as they are, by the layer's name; none if it does not.

    Args:
        statistics: What the experts did on calibration text, in all layers.
        recipe: The method.
    """
    largest = [sums.pooled().output_max for sums in statistics.layers.values()]
    found = {
        name: torch.zeros(len(outputs), dtype=torch.bool)
        for name, outputs in zip(statistics.layers, largest, strict=True)
    }
    if recipe.protects_super_experts:
        for alone, experts in zip(found.values(), super_experts(largest, _DEPTH), strict=True):
            alone[experts] = True
    return found


def plan_layer(
    layer: MoELayer,
    evidence: Evidence,
    recipe: Recipe,
    num_groups: int,
    *,
    alone: Bool[Tensor, " experts"],
) -> LayerPlan:
    """Decides what becomes of the experts of one layer.

    Args:
        layer: The layer.
        evidence: All that is known of it.
        recipe: The method.
        num_groups: Experts to keep.
        alone: Experts that stay as they are.
    """
    total = layer.num_experts
    if num_groups == total:
        return LayerPlan(layer.name, total, tuple((e,) for e in range(total)))
    blocks = router_blocks(layer, recipe.execution.router)
    size, each = total // blocks, num_groups // blocks
    assignment = torch.full((total,), -1)
    weights = torch.ones(total, dtype=torch.float64)
    for block in range(blocks):
        members = torch.arange(block * size, (block + 1) * size)
        part = evidence if blocks == 1 else evidence.select(members)
        slots, shares = recipe(part, each, alone[members].to(evidence.gates.device))
        assignment[members] = torch.where(slots < 0, -1, slots + block * each).cpu()
        weights[members] = shares.cpu()
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    for expert, slot in enumerate(assignment.tolist()):
        if slot >= 0:
            groups[slot].append(expert)
    dropped = tuple((assignment < 0).nonzero().squeeze(1).tolist())
    kept_alone = tuple(e for e in alone.nonzero().squeeze(1).tolist() if [e] in groups)
    return LayerPlan(layer.name, total, tuple(map(tuple, groups)), dropped, weights, kept_alone)
