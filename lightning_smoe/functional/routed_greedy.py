"""Groups by what merging really costs: the error of the routed output, token by token."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.grouping import Grouper
from lightning_smoe.functional.partition import check_num_groups, numbered, positive_mass
from lightning_smoe.functional.saliency import GateMass, Saliency


@dataclass(frozen=True)
class RoutedGreedy(Grouper):
    """Merges, again and again, the two groups that add least to the error of the routed output.

    `J = sum_c E ||sum_{j in c} g_j f_j - (sum_{j in c} g_j) sum_{j in c} b_j f_j||^2`: outputs f
    replaced by their average with shares b, under the summed routing weights g. Shares are the mass
    of each member within its group. With `F_c = sum_j b_j f_j`, `s_c = sum_j g_j`, error
    `e_c = sum_j g_j f_j - s_c F_c`, and `B_a`, `B_b` the shares of a and b in their union, joining
    them adds `E[2 e_a e_b + 2 r (e_a + e_b)(F_a - F_b) + r^2 ||F_a - F_b||^2]`,
    `r = s_a B_b - s_b B_a`. All follows from the inner products of outputs on each token.

    Unlike `GateMassWard` it sees which experts are used together and how routing weights vary, but
    an exact price does not make a greedy choice a good one: on the model it was tried on it was
    level with `GateMassWard` at a quarter of the experts cut, and behind it at a half.

    Args:
        mass: What shares are in proportion to.
        num_tokens: Tokens of the sample that are looked at, at least 1, spread evenly over it. Each
            takes `4 num_experts^2` bytes, and the time is in proportion.
    """

    mass: Saliency = GateMass()
    num_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens={self.num_tokens} judges by nothing; take 1 or more")

    def __call__(self, evidence: Evidence, num_groups: int) -> Int64[Tensor, " experts"]:
        check_num_groups(num_groups, evidence.num_experts)
        labels = torch.arange(evidence.num_experts, device=evidence.gates.device)
        if num_groups == len(labels):
            return labels
        sample = evidence.sample.thinned(self.num_tokens)
        groups = _Groups(
            _output_grams(replace(evidence, sample=sample)),
            sample.gates.T.contiguous(),
            positive_mass(self.mass(evidence)).to(sample.gates),
        )
        return numbered(groups.merge_down_to(num_groups))


class _Groups:
    """A partition that grows coarser, with all that its next merge is priced by.

    What belongs to a group is kept at each of its members, so that sums over members need not know
    who is where.

    Args:
        grams: Inner products of each two experts' outputs, on each token.
        gates: Routing weights.
        mass: Mass of each expert, above zero.
    """

    def __init__(
        self,
        grams: Float[Tensor, "experts experts tokens"],
        gates: Float[Tensor, "experts tokens"],
        mass: Float[Tensor, " experts"],
    ) -> None:
        self.grams, self.gates, self.mass = grams, gates, mass
        self.labels = torch.arange(len(mass), device=mass.device)
        # Of the expert: its share b in the group, and what g - s b the group's gate leaves of g.
        self.share = torch.ones_like(mass)[:, None]
        self.residual = torch.zeros_like(gates)
        # Of its group: mass, gate s, and the inner product of the expert with the mean output.
        self.group_mass = mass[:, None].clone()
        self.group_gate = gates.clone()
        self.with_mean = grams.diagonal().mT.clone()

    def merge_down_to(self, num_groups: int) -> Int64[Tensor, " experts"]:
        """Merges the cheapest two groups until few enough are left."""
        num_experts = len(self.mass)
        cost = self.first_increases()
        for _ in range(num_experts - num_groups):
            gone, kept = sorted(divmod(int(cost.argmin()), num_experts), reverse=True)
            self.join(kept, gone)
            cost[gone], cost[:, gone] = torch.inf, torch.inf
            row = torch.where(cost[kept].isinf(), torch.inf, self.increases(kept))
            cost[kept], cost[:, kept] = row, row
        return self.labels

    def join(self, kept: int, gone: int) -> None:
        """Makes one group of two."""
        self.labels[self.labels == gone] = kept
        members = (self.labels == kept).nonzero().squeeze(1)
        mass, gates = self.mass[members], self.gates[members]
        share, gate = mass / mass.sum(), gates.sum(0)
        self.group_mass[members], self.group_gate[members] = mass.sum(), gate
        self.share[members] = share[:, None]
        self.residual[members] = gates - share[:, None] * gate
        within = self.grams[members[:, None], members]
        self.with_mean[members] = torch.tensordot(share, within, 1)

    def first_increases(self) -> Float64[Tensor, "experts experts"]:
        """What joining each two experts costs: `E (g_i B_j - g_j B_i)^2 ||f_i - f_j||^2`."""
        own = torch.zeros_like(self.grams[:, :, 0], dtype=torch.float64)
        joint = torch.zeros_like(own)
        for expert, gram in enumerate(self.grams):
            visits = self.gates[expert].nonzero().squeeze(1)
            gates, energy = self.gates[:, visits], self.with_mean[:, visits]
            weighted = gates[expert] * (energy + energy[expert] - 2 * gram[:, visits])
            own[expert] = (gates[expert] * weighted).sum(1, dtype=torch.float64)
            joint[expert] = (gates * weighted).sum(1, dtype=torch.float64)
        mass = self.group_mass.double()
        share = mass.mT / (mass + mass.mT)
        cost = share.square() * own - share * share.mT * joint
        return (cost + cost.mT).fill_diagonal_(torch.inf)

    def increases(self, group: int) -> Float64[Tensor, " experts"]:
        """What joining this group with each other adds to the error, at the label of the other."""
        members = (self.labels == group).nonzero().squeeze(1)
        share, rows = self.share[members], self.grams[members]
        # Inner products of each expert with the group's mean output and with its error.
        to_mean = torch.tensordot(share[:, 0], rows, 1)
        to_error = (self.residual[members, None] * rows).sum(0)
        energy = (share * to_mean[members]).sum(0)
        error_mean = (share * to_error[members]).sum(0)
        mass, gate = self.group_mass[members[0]], self.group_gate[members[0]]
        total = mass + self.group_mass
        ratio = gate * (self.group_mass / total) - self.group_gate * (mass / total)
        cross = self.share * (error_mean - to_error) + self.residual * (to_mean - self.with_mean)
        gap = self.share * (energy + self.with_mean - 2 * to_mean)
        added = 2 * self.residual * to_error + ratio * (2 * cross + ratio * gap)
        belongs = one_hot(self.labels, len(self.labels)).double()
        increase: Tensor = added.sum(1, dtype=torch.float64) @ belongs
        return increase


def _output_grams(evidence: Evidence) -> Float[Tensor, "experts experts tokens"]:
    """Inner products of the outputs of each two experts, on each token."""
    num_experts, num_tokens = evidence.num_experts, evidence.sample.num_tokens
    grams = torch.empty(num_experts, num_experts, num_tokens, device=evidence.gates.device)
    for tokens, outputs in evidence.output_blocks():
        by_token = outputs.transpose(0, 1)
        grams[:, :, tokens] = (by_token @ by_token.mT).permute(1, 2, 0)
    return grams
