"""Several experts in one slot: its most valuable neurons stay, rescaled to the summed gates.

Experts share a slot under the sum of their routing weights, and all router rows stay. Neuron n of
expert i, with activation h and output column d, then fires with s = sum_{j in slot} g_j where it
fired with g_i. Least squares over tokens give its best scale, and the energy that it keeps:

    alpha = sum_x g_i s h^2 / sum_x s^2 h^2,   gain = ||d||^2 (sum_x g_i s h^2)^2 / sum_x s^2 h^2.

The slot keeps the neurons of largest gain, as many as one expert has. Cross terms between neurons
are left out: a joint refit of the output matrices afterwards makes up for most of them.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.merging import GroupTokens, Merger, required_tokens


@dataclass(frozen=True)
class NeuronPool(Merger):
    """Keeps the most valuable neurons of all members, each rescaled once in closed form.

    Matched neuron pooling has no published source. Equal neurons of several members (rows of gate
    and up projection, and their biases) count as one, whose output column is the sum of theirs,
    each scaled; so copies of one expert give that expert. Weights are never averaged.

    Args:
        order: What decides which neurons stay: `gain`, the energy that a neuron keeps under the
            summed gates, or `energy`, what it contributed under its own expert's gate.
        rescale: Scale output columns to the summed gates; without, neurons stay as they are.
    """

    needs_tokens: ClassVar[bool] = True
    order: Literal["gain", "energy"] = "gain"
    rescale: bool = True

    def __call__(
        self,
        members: ExpertWeights,
        weights: Float[Tensor, " members"],
        tokens: GroupTokens | None = None,
    ) -> ExpertWeights:
        heaviest = int(weights.argmax())
        sums = slot_sums(members, required_tokens(self, tokens).routed())
        if not bool((sums.shared > 0).any()):  # No token visits the group.
            return members.map(lambda tensor: tensor[heaviest : heaviest + 1])
        neurons = _Neurons.of(members, sums, self.rescale)
        value = neurons.gain if self.order == "gain" else neurons.energy
        width = members.up_proj.shape[1]
        # Stable, then in their old order: the same neurons give the same slot on every machine.
        chosen = value.argsort(descending=True, stable=True)[:width].sort().values
        return neurons.expert(members, chosen, self._bias(members, sums))

    def _bias(self, members: ExpertWeights, sums: "SlotSums") -> Tensor | None:
        """The output bias that fits the summed gates best; it fires like a neuron that is 1."""
        if members.down_bias is None:
            return None
        scale = sums.gate_cross / sums.gate_shared
        if not self.rescale:
            scale = torch.full_like(scale, 1 / len(scale))
        return scale @ members.down_bias.double()


@dataclass(frozen=True, eq=False)
class SlotSums:
    """Sums over tokens for the neurons of the members of one slot; s is the sum of their gates.

    Args:
        own: Sum of g_i^2 h^2.
        cross: Sum of g_i s h^2.
        shared: Sum of s^2 h^2.
        gate_cross: Sum of g_i s.
        gate_shared: Sum of s^2.
    """

    own: Float64[Tensor, "members intermediate"]
    cross: Float64[Tensor, "members intermediate"]
    shared: Float64[Tensor, "members intermediate"]
    gate_cross: Float64[Tensor, " members"]
    gate_shared: Float64[Tensor, ""]


def slot_sums(members: ExpertWeights, tokens: GroupTokens) -> SlotSums:
    """Sums over tokens as one slot of all members sees them, in bounded memory."""
    width = members.up_proj.shape[1]
    sums = torch.zeros(
        len(members.up_proj), 3, width, dtype=torch.float64, device=tokens.gates.device
    )
    for block in tokens.blocks():
        slot = block.gates.sum(1, keepdim=True)
        for member in range(len(sums)):
            own = block.gates[:, member : member + 1]
            factors = torch.cat([own * own, own * slot, slot * slot], dim=1)
            # Squares overflow in float16, and lose most of their digits in bfloat16.
            hidden = members.activations(block.states, member, tokens.activate)
            wide = torch.promote_types(hidden.dtype, torch.float32)
            sums[member] += (factors.to(wide).T @ hidden.to(wide).square()).double()
    gates = tokens.gates.double()
    slot = gates.sum(1, keepdim=True)
    own_sum, cross, shared = sums.unbind(1)
    return SlotSums(own_sum, cross, shared, (gates * slot).sum(0), slot.square().sum())


@dataclass(frozen=True, eq=False)
class _Neurons:
    """The different neurons of all members.

    Args:
        source: Where each stands among the members' neurons, laid end to end.
        column: Output column for the summed gates.
        gain: Energy that it keeps.
        energy: Energy that it had.
    """

    source: Int64[Tensor, " neurons"]
    column: Float64[Tensor, "neurons hidden"]
    gain: Float64[Tensor, " neurons"]
    energy: Float64[Tensor, " neurons"]

    @staticmethod
    def of(members: ExpertWeights, sums: SlotSums, rescale: bool) -> "_Neurons":
        source, label = _distinct(members)
        columns = members.down_proj.double().mT.flatten(0, 1)
        shared = sums.shared.flatten()
        # A neuron that never fires keeps its column: nothing says that it should not.
        scale = torch.where(shared > 0, sums.cross.flatten() / shared, 1.0)

        def summed(values: Tensor) -> Tensor:
            total = values.new_zeros(len(source), *values.shape[1:])
            return total.index_add_(0, label, values)

        fitted = summed(columns * scale[:, None])
        gain = fitted.square().sum(1) * shared[source]
        energy = summed(columns.square().sum(1) * sums.own.flatten())
        if not rescale:
            count = summed(torch.ones_like(scale))
            fitted = summed(columns) / count[:, None]
        return _Neurons(source, fitted, gain, energy)

    def expert(
        self, members: ExpertWeights, chosen: Int64[Tensor, " neurons"], bias: Tensor | None
    ) -> ExpertWeights:
        """One expert of the chosen neurons; where they are too few, the rest are zero."""
        width = members.up_proj.shape[1]
        source = self.source[chosen]

        def rows(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            taken = tensor.flatten(0, 1)[source]
            padding = taken.new_zeros(width - len(taken), *taken.shape[1:])
            return torch.cat([taken, padding])[None]

        column = self.column[chosen].to(members.down_proj.dtype)
        down = column.new_zeros(1, column.shape[1], width)
        down[0, :, : len(column)] = column.T
        up = rows(members.up_proj)
        if up is None:
            raise TypeError("experts have no up projection")
        return ExpertWeights(
            up,
            down,
            rows(members.gate_proj),
            rows(members.gate_bias),
            rows(members.up_bias),
            None if bias is None else bias[None].to(members.down_proj.dtype),
        )


def neuron_rows(members: ExpertWeights) -> Float[Tensor, "members intermediate inputs"]:
    """All that decides when and how strongly each neuron fires, side by side."""
    parts = [members.up_proj]
    if members.gate_proj is not None:
        parts.append(members.gate_proj)
    parts += [b.unsqueeze(-1) for b in (members.gate_bias, members.up_bias) if b is not None]
    return torch.cat(parts, dim=-1)


def _distinct(
    members: ExpertWeights,
) -> tuple[Int64[Tensor, " distinct"], Int64[Tensor, " neurons"]]:
    """First place of each different neuron, and for every neuron which of them it equals."""
    rows = neuron_rows(members).flatten(0, 1)
    _, label = torch.unique(rows, dim=0, return_inverse=True)
    place = torch.arange(len(rows), device=rows.device)
    first = place.new_full((int(label.max()) + 1,), len(rows))
    first = first.scatter_reduce(0, label, place, "amin")
    order = first.argsort()
    return first[order], order.argsort()[label]
