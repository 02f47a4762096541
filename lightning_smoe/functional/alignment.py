"""Experts with their intermediate neurons in a common order, so that they can be averaged."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_smoe.functional.experts import ExpertWeights


def align_neurons(members: ExpertWeights, reference: int) -> ExpertWeights:
    """Permutes every member's neurons to match the reference's; no member's function changes.

    Maximises the sum of inner products of matched neurons, each neuron being its gate row, up row,
    their biases and its down column (weight matching of M-SMoE, https://arxiv.org/abs/2310.01334).

    Args:
        members: Experts that are to be merged.
        reference: Index of the member whose order of neurons stays.

    Returns:
        The members, their neurons reordered.
    """
    target = _neurons(members, reference)
    order = [
        torch.arange(len(target), device=target.device)
        if member == reference
        else _match(target, _neurons(members, member))
        for member in range(len(members.up_proj))
    ]
    return _reorder(members, torch.stack(order))


def _neurons(members: ExpertWeights, member: int) -> Float[Tensor, "intermediate features"]:
    """Lays out all that belongs to each neuron of one member in a row."""
    rows = [members.gate_proj, members.up_proj, members.gate_bias, members.up_bias]
    parts = [tensor[member] for tensor in rows if tensor is not None]
    parts.append(members.down_proj[member].mT)
    joined = torch.cat([part.unsqueeze(1) if part.ndim == 1 else part for part in parts], dim=1)
    return joined.to(torch.promote_types(joined.dtype, torch.float32))


def _match(
    target: Float[Tensor, "intermediate features"], moved: Float[Tensor, "intermediate features"]
) -> Int64[Tensor, " intermediate"]:
    """Finds the neuron to put at each place of the target."""
    similarity = target @ moved.mT
    from scipy.optimize import linear_sum_assignment

    _, chosen = linear_sum_assignment(similarity.numpy(force=True), maximize=True)
    return torch.tensor(chosen.tolist(), device=target.device)


def _reorder(members: ExpertWeights, order: Int64[Tensor, "members intermediate"]) -> ExpertWeights:
    def along_rows(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.take_along_dim(order if tensor.ndim == 2 else order.unsqueeze(2), dim=1)

    return ExpertWeights(
        up_proj=members.up_proj.take_along_dim(order.unsqueeze(2), dim=1),
        down_proj=members.down_proj.take_along_dim(order.unsqueeze(1), dim=2),
        gate_proj=along_rows(members.gate_proj),
        gate_bias=along_rows(members.gate_bias),
        up_bias=along_rows(members.up_bias),
        down_bias=members.down_bias,
    )
