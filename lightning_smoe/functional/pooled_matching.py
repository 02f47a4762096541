"""Who shares a slot with whom, by what neuron pooling would lose."""

from dataclasses import dataclass
from hashlib import sha256

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.grouping import Grouper
from lightning_smoe.functional.matching import cheapest_pairs
from lightning_smoe.functional.pooling import neuron_rows


@dataclass(frozen=True)
class PooledMatching(Grouper):
    """Pairs experts by exact minimum-weight matching on what pooling their neurons would lose.

    The cost of a slot is the energy of its members' neurons less the largest gains under the summed
    gates, as many as one expert has neurons (see `functional.pooling`). Exactly as many pairs are
    matched as slots must go; the other experts stay alone. Below half the experts, pairs are
    matched again into groups of four, and so on. Equal experts share a slot first, at no cost. No
    published source.
    """

    def __call__(self, evidence: Evidence, num_groups: int) -> Int64[Tensor, " experts"]:
        if not 1 <= num_groups <= evidence.num_experts:
            raise ValueError(
                f"num_groups={num_groups} is impossible with {evidence.num_experts} experts; "
                f"take 1 to {evidence.num_experts}"
            )
        labels, firsts = _equal_experts(evidence, num_groups)
        gates = evidence.gates.new_zeros(len(evidence.gates), len(firsts))
        gates.index_add_(1, labels, evidence.gates)
        slots = [[index] for index in range(len(firsts))]
        while len(slots) > num_groups:
            merges = min(len(slots) - num_groups, len(slots) // 2)
            cost = slot_costs(evidence, firsts, gates, slots)
            pairs = cheapest_pairs(cost, merges)
            gone = {second for _, second in pairs}
            joined = dict(pairs)
            slots = [
                slot + (slots[joined[index]] if index in joined else [])
                for index, slot in enumerate(slots)
                if index not in gone
            ]
        slot_of = {member: number for number, slot in enumerate(slots) for member in slot}
        found = [slot_of[label] for label in labels.tolist()]
        number = {label: index for index, label in enumerate(dict.fromkeys(found))}
        return torch.tensor([number[label] for label in found], device=labels.device)


def slot_costs(
    evidence: Evidence,
    experts: list[int],
    gates: Float[Tensor, "tokens members"],
    slots: list[list[int]],
) -> Float64[Tensor, "groups groups"]:
    """What is lost more by joining two slots than by leaving them apart.

    Args:
        evidence: All that is known of the layer.
        experts: Number of each expert in question.
        gates: Their routing weights.
        slots: Which of them share a slot now.

    Returns:
        Energy lost, symmetric, with a diagonal of zeros.
    """
    gains, energies = zip(
        *(
            _gains(evidence, expert, gates, slots, place=place)
            for place, expert in enumerate(experts)
        ),
        strict=True,
    )
    width = evidence.weights.up_proj.shape[1]
    energy = torch.stack([torch.stack([energies[e] for e in slot]).sum() for slot in slots])

    def kept(first: int, second: int) -> Tensor:
        parts = [gains[e][second] for e in slots[first]]
        if second != first:
            parts += [gains[e][first] for e in slots[second]]
        every = torch.cat(parts)
        return every.topk(min(width, len(every))).values.sum(dtype=torch.float64)

    alone = torch.stack([energy[i] - kept(i, i) for i in range(len(slots))])
    cost = torch.zeros(len(slots), len(slots), dtype=torch.float64)
    for first in range(len(slots)):
        for second in range(first):
            both = energy[first] + energy[second] - kept(first, second)
            cost[first, second] = both - alone[first] - alone[second]
    return cost + cost.T


def _gains(
    evidence: Evidence,
    expert: int,
    gates: Float[Tensor, "tokens members"],
    slots: list[list[int]],
    *,
    place: int,
) -> tuple[Float[Tensor, "groups intermediate"], Float64[Tensor, ""]]:
    """Energy that an expert's neurons keep if its slot joined each slot, and what they have now."""
    here = next(number for number, slot in enumerate(slots) if place in slot)
    shared = torch.stack([gates[:, slot].sum(1) for slot in slots], dim=1)
    squares = evidence.activations(expert).float().square().T
    own, slot = gates[:, place], shared[:, here]
    visits = slot.nonzero().squeeze(1)
    visited = squares[:, visits]
    # Only the last product runs over all tokens: the others vanish where the slot is not visited.
    other = shared[visits]
    cross = visited @ (own[visits, None] * other)
    mixed = visited @ (slot[visits, None] * other)
    alone_cross, alone_shared = cross[:, [here]], mixed[:, [here]]
    whole = squares @ shared.square()
    cross = cross + alone_cross
    whole = whole + 2 * mixed + alone_shared
    cross[:, here], whole[:, here] = alone_cross.squeeze(1), alone_shared.squeeze(1)
    column = evidence.weights.down_proj[expert].float().square().sum(0)
    gain = torch.where(whole > 0, cross.square() / whole, 0.0) * column[:, None]
    energy = (visited @ own[visits].square()).double() @ column.double()
    return gain.T, energy


def _equal_experts(
    evidence: Evidence, num_groups: int
) -> tuple[Int64[Tensor, " experts"], list[int]]:
    """Labels equal experts alike, as long as more than enough labels are left.

    Returns:
        Label of each expert, and the first expert of each label.
    """
    device = evidence.gates.device
    labels: list[int] = []
    firsts: list[int] = []
    seen: dict[bytes, int] = {}
    surplus = evidence.num_experts - num_groups
    for expert in range(evidence.num_experts):
        one = evidence.weights.select(torch.tensor([expert], device=device))
        rows = torch.cat([neuron_rows(one), one.down_proj.mT], dim=2)[0].float()
        parts = [torch.unique(rows, dim=0)]  # sorted: the order of neurons does not matter
        parts += [] if one.down_bias is None else [one.down_bias.float()]
        key = sha256(b"".join(part.numpy(force=True).tobytes() for part in parts)).digest()
        if key in seen and surplus > 0:
            surplus -= 1
            labels.append(seen[key])
            continue
        seen[key] = len(firsts)
        labels.append(len(firsts))
        firsts.append(expert)
    return torch.tensor(labels, device=device), firsts
