"""A plan carried out on a layer: experts merged or kept, router rows following."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.compression.plan import CompressionPlan, LayerPlan
from lightning_smoe.functional.alignment import align_neurons
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.moments import Moments
from lightning_smoe.functional.router import RouterRows
from lightning_smoe.models.expert_count import set_expert_count
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.router import RouterTensor


@torch.no_grad()
def apply_plan(model: PreTrainedModel, plan: CompressionPlan) -> None:
    """Carries out a plan that reads no tokens, in place.

    Raises:
        ValueError: The plan fits its router or its experts on tokens; see `CompressionModule`.
    """
    if plan.reads_tokens:
        raise ValueError("the plan is fitted on calibration tokens; run it with CompressionModule")
    layers = find_moe_layers(model)
    plans = plan.by_name()
    for layer in layers:
        if layer.name in plans:
            apply_layer(layer, plans[layer.name], plan, None)
    tell_count(model)


def tell_count(model: PreTrainedModel) -> None:
    """Writes the number of experts into the model's configuration, where all layers agree."""
    counts = {layer.num_experts for layer in find_moe_layers(model)}
    if len(counts) == 1:
        set_expert_count(model, counts.pop())


@torch.no_grad()
def apply_layer(
    layer: MoELayer, layer_plan: LayerPlan, plan: CompressionPlan, moments: Moments | None
) -> None:
    """Carries out one layer's plan, without the refit, in place.

    Args:
        layer: The original layer.
        layer_plan: What becomes of its experts.
        plan: How slots are filled and the router is repaired.
        moments: Tokens' products for a router repair that is fitted; none if not needed.
    """
    grouping = layer_plan.grouping
    weights = _fill_slots(layer, layer_plan, plan)
    rows = plan.router(router_rows(layer), grouping, moments)
    mixing = grouping.mixing()
    if plan.router.keeps_heaviest:
        mixing = torch.zeros_like(mixing).scatter(1, mixing.argmax(1, keepdim=True), 1.0)

    def follow(tensor: RouterTensor) -> Tensor:
        if tensor.kind == "weight":
            return rows.weight
        if tensor.kind == "bias" and rows.bias is not None:
            return rows.bias
        old = tensor.rows
        return (mixing.to(old.device) @ old.double().reshape(len(old), -1)).view(-1, *old.shape[1:])

    layer.replace(weights, follow)


def router_rows(layer: MoELayer) -> RouterRows:
    """The rows that give a layer's router logits."""
    by_kind = {tensor.kind: tensor.rows for tensor in layer.router_tensors}
    return RouterRows(by_kind["weight"], by_kind.get("bias"))


def _fill_slots(layer: MoELayer, layer_plan: LayerPlan, plan: CompressionPlan) -> ExpertWeights:
    """Puts one expert into every slot, one group in memory at a time."""
    all_weights = layer.weights()
    if all(len(group) == 1 for group in layer_plan.groups):
        kept = [group[0] for group in layer_plan.groups]
        return all_weights.select(torch.tensor(kept, device=all_weights.up_proj.device))
    shares = layer_plan.grouping.weights
    slots = []
    for group in layer_plan.groups:
        members = all_weights.select(torch.tensor(group, device=all_weights.up_proj.device))
        slots.append(_merge(members, shares[list(group)], plan) if len(group) > 1 else members)
    return ExpertWeights.stack(slots)


def _merge(members: ExpertWeights, shares: Tensor, plan: CompressionPlan) -> ExpertWeights:
    if plan.align:
        members = align_neurons(members, int(shares.argmax()))
    return plan.merger(members, shares)
