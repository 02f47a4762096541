"""From statistics and a recipe to a plan; no model runs."""

import math
from collections.abc import Mapping, Sequence

import torch

from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.compression.plan import CompressionPlan, LayerPlan
from lightning_smoe.compression.recipe import Recipe
from lightning_smoe.errors import InputError
from lightning_smoe.functional.sums import ExpertSums
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.layer import MoELayer


def experts_to_keep(keep: int | float, layer: MoELayer) -> int:
    """Number of experts that a layer keeps.

    Args:
        keep: A fraction of the layer's experts, in (0, 1] and not whole, or a count; 1.0 is all.
        layer: The layer.

    Raises:
        InputError: It is no number, above the count, or below what the router selects or needs.
    """
    if not math.isfinite(keep) or keep <= 0:
        raise InputError(
            f"model.keep is {keep}; give a fraction in (0, 1] or a number of experts a layer"
        )
    is_fraction = isinstance(keep, float) and keep <= 1
    count = round(keep * layer.num_experts) if is_fraction else int(keep)
    if not is_fraction and count != keep:
        raise InputError(f"model.keep is {keep}; a number of experts must be whole")
    if count > layer.num_experts:
        raise InputError(
            f"model.keep asks for {count} experts but {layer.name} has {layer.num_experts}"
        )
    floor = max(layer.top_k, layer.num_router_groups * layer.min_experts_per_router_group)
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


def make_plan(
    statistics: Statistics,
    layers: Sequence[MoELayer],
    recipe: Recipe,
    counts: Mapping[str, int],
    *,
    manifest: Manifest | None = None,
) -> CompressionPlan:
    """Decides what becomes of every expert.

    Args:
        statistics: What the experts did on calibration text.
        layers: Layers to change.
        recipe: The method.
        counts: Experts to keep, by the layer's name.
        manifest: What the plan is made from.

    Raises:
        InputError: The statistics are of another model, or lack what the recipe needs.
    """
    if recipe.needs_all_experts and not statistics.has_all_experts:
        raise InputError(
            "the recipe compares outputs of all experts, and calibration ran the routed ones only; "
            "calibrate again with this recipe and model.overwrite true"
        )
    plans = []
    for layer in layers:
        if layer.name not in statistics.layers:
            raise InputError(f"the statistics have no layer {layer.name}; calibrate this model")
        sums = statistics.layers[layer.name].pooled()
        plans.append(_plan_layer(layer, sums, recipe, counts[layer.name]))
    router, merger, align, refit = recipe.execution
    fingerprint = str(statistics.manifest.inputs.get("checkpoint", ""))
    return CompressionPlan(tuple(plans), router, merger, align, refit, fingerprint, manifest)


def _plan_layer(layer: MoELayer, sums: ExpertSums, recipe: Recipe, num_groups: int) -> LayerPlan:
    total = layer.num_experts
    if num_groups == total:
        return LayerPlan(layer.name, total, tuple((e,) for e in range(total)))
    blocks = torch.arange(total) * layer.num_router_groups // total
    assignment, weights = recipe(sums, blocks, num_groups)
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    for expert, slot in enumerate(assignment.tolist()):
        if slot >= 0:
            groups[slot].append(expert)
    dropped = tuple((assignment < 0).nonzero().squeeze(1).tolist())
    return LayerPlan(layer.name, total, tuple(map(tuple, groups)), dropped, weights)
