"""A plan carried out on a layer: experts merged or kept, router rows following."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.compression.layer_plan import LayerPlan
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.errors import InputError
from lightning_smoe.functional.evidence import TokenSample
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.merging import GroupTokens
from lightning_smoe.functional.router import RouterRows, RouterTokens
from lightning_smoe.models.expert_count import set_expert_count
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.mapped import become_mapped
from lightning_smoe.models.router import RouterTensor


@torch.no_grad()
def apply_plan(
    model: PreTrainedModel,
    plan: CompressionPlan,
    samples: Mapping[str, TokenSample] | None = None,
) -> None:
    """Carries out a plan that takes no text through the model, in place.

    Args:
        model: The original; it is the compressed model afterwards.
        plan: What becomes of its experts.
        samples: Samples of tokens by the layer's name, for mergers that look at them.

    Raises:
        ValueError: The plan fits its router or its experts on tokens; see `CompressionModule`.
    """
    if plan.reads_tokens:
        raise ValueError("the plan is fitted on calibration tokens; run it with CompressionModule")
    layers = find_moe_layers(model)
    plans = plan.by_name()
    for layer in layers:
        if layer.name in plans:
            apply_layer(layer, plans[layer.name], plan, sample=(samples or {}).get(layer.name))
    finish(model)


def finish(model: PreTrainedModel) -> None:
    """Tells the model and its configuration what its layers have become.

    The number of experts stands in the configuration where all layers agree; a model whose router
    rows share experts becomes one of the `map` format.
    """
    if any(layer.expert_map is not None for layer in find_moe_layers(model)):
        become_mapped(model)
        return
    counts = {layer.num_experts for layer in find_moe_layers(model)}
    if len(counts) == 1:
        set_expert_count(model, counts.pop())


@torch.no_grad()
def apply_layer(
    layer: MoELayer,
    layer_plan: LayerPlan,
    plan: CompressionPlan,
    *,
    tokens: RouterTokens | None = None,
    sample: TokenSample | None = None,
) -> None:
    """Carries out one layer's plan, without the refit, in place.

    Args:
        layer: The original layer.
        layer_plan: What becomes of its experts.
        plan: How slots are filled and the router is repaired.
        tokens: What a router repair is fitted on; none if not needed.
        sample: Tokens for a merger or an alignment that looks at them; none if not needed.
    """
    grouping = layer_plan.grouping
    weights = _fill_slots(layer, layer_plan, plan, sample)
    if plan.router.keeps_all_rows:
        layer.share(weights, grouping.assignment)
        return
    rows = plan.router(router_rows(layer), grouping, tokens)
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


def _fill_slots(
    layer: MoELayer, layer_plan: LayerPlan, plan: CompressionPlan, sample: TokenSample | None
) -> ExpertWeights:
    """Puts one expert into every slot, one group in memory at a time."""
    all_weights = layer.weights()
    device = all_weights.up_proj.device
    if all(len(group) == 1 for group in layer_plan.groups):
        kept = [group[0] for group in layer_plan.groups]
        return all_weights.select(torch.tensor(kept, device=device))
    if plan.needs_sample and sample is None:
        raise InputError(
            f"{layer.name}: the plan's merger looks at a sample of tokens, and there is none; "
            "calibrate this model first"
        )
    sample = None if sample is None else sample.to(device)
    shares = layer_plan.grouping.weights.to(device)
    slots = []
    for group in layer_plan.groups:
        chosen = torch.tensor(group, device=device)
        members = all_weights.select(chosen)
        if len(group) > 1:
            tokens = None
            if sample is not None and plan.needs_sample:
                tokens = GroupTokens(sample.states, sample.gates[:, chosen], layer.activate)
            members = _merge(members, shares[chosen], plan, tokens)
        slots.append(members)
    return ExpertWeights.stack(slots)


def _merge(
    members: ExpertWeights, shares: Tensor, plan: CompressionPlan, tokens: GroupTokens | None
) -> ExpertWeights:
    if plan.alignment is not None:
        members = plan.alignment(members, int(shares.argmax()), tokens)
    return plan.merger(members, shares, tokens)
