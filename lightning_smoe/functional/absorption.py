"""What a layer loses with a change of its slots, once the other experts are refitted to it.

Optimal brain surgeon (https://arxiv.org/abs/2208.11580) at the grain of experts, on few sampled
tokens and so in its dual form. Features of expert j are g_j(x) h_j(x), with routing weight
g and hidden activations h; the kernel of a layer of slots S is

    K = sum_{j in S} (g_j g_j^T) * (H_j H_j^T),    tokens times tokens.

A change of slots takes R, tokens times hidden, from the output. A ridge refit of all output
matrices toward the old ones leaves A R of it, A = lam (K + lam I)^-1, with the kernel of the slots
that are there after the change.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.merging import GroupTokens, Merger
from lightning_smoe.functional.refit import check_strength


@dataclass(frozen=True, eq=False)
class SlotChange:
    """What a change of slots does to a layer, on the sampled tokens that it touches.

    Args:
        visits: Those tokens.
        kernel: Inner products of the features that come, less those of the features that go.
        missing: Output that goes missing, less the output that comes.
    """

    visits: Int64[Tensor, " _"]
    kernel: Float64[Tensor, "_ _"]
    missing: Float64[Tensor, "_ hidden"]


@dataclass(frozen=True, eq=False)
class Absorber:
    """The experts of a layer as a refit sees them: tells what it could not make up for.

    The shared expert, which a refit changes too, is not among them: evidence does not have it, so
    prices are somewhat high. Routing weights of the other experts count as unchanged: no expert is
    promoted in the place of a dropped one.

    Args:
        evidence: All that is known of the layer, on as few tokens as the kernel has.
        inverse: `(K + lam I)^-1` of all experts.
    """

    evidence: Evidence
    inverse: Float64[Tensor, "tokens tokens"]

    @staticmethod
    def of(evidence: Evidence, num_tokens: int, strength: float) -> "Absorber":
        """Takes tokens evenly from the sample, and inverts their kernel.

        Args:
            evidence: All that is known of the layer.
            num_tokens: Tokens to take; all of them if there are fewer.
            strength: lam relative to the mean energy of a feature that fires, at least 1e-6.
        """
        check_strength(strength)
        evidence = replace(evidence, sample=evidence.sample.thinned(num_tokens))
        number = evidence.sample.num_tokens
        device = evidence.gates.device
        kernel = torch.zeros(number, number, dtype=torch.float64, device=device)
        fired = torch.zeros((), dtype=torch.float64, device=device)
        for expert in range(evidence.num_experts):
            visits = evidence.gates[:, expert].nonzero().squeeze(1)
            seen = _seen(evidence, [expert], visits)
            features = _features(seen, evidence.weights, expert)
            kernel[visits[:, None], visits] += features @ features.T
            fired += features.ne(0).any(0).sum()
        shrinkage = strength * kernel.trace() / fired.clamp(min=1)
        # Where no expert does anything, any shrinkage says so.
        kernel.diagonal().add_(shrinkage if shrinkage > 0 else 1.0)
        return Absorber(evidence, torch.cholesky_inverse(torch.linalg.cholesky(kernel)))

    def drop(self, expert: int) -> SlotChange:
        """What goes with an expert."""
        return self._change([expert], None)

    def merge(self, experts: Sequence[int], merger: Merger) -> SlotChange:
        """What goes with experts, less what comes with one in their place.

        It runs under the sum of their routing weights and is merged with equal shares, on the
        tokens of the kernel.
        """
        chosen = torch.tensor(experts, device=self.evidence.gates.device)
        members = self.evidence.weights.select(chosen)
        sample = self.evidence.sample
        tokens = GroupTokens(sample.states, sample.gates[:, chosen], self.evidence.activate)
        shares = torch.ones(len(chosen), dtype=torch.float64, device=chosen.device)
        return self._change(experts, merger(members, shares, tokens))

    def price(self, change: SlotChange) -> float:
        """Squared error that a change leaves after the refit, each token left out of its own fit.

        `sum_t ||(A R)_t / A_tt||^2`: the closed form of fitting to all tokens but t and looking at
        t, for the fit to few tokens would make up for nearly everything on these. The inverse
        follows from that of all experts by a change as large as the number of tokens touched.
        """
        columns = self.inverse[:, change.visits]
        block = columns[change.visits]
        unit = torch.eye(len(block), dtype=block.dtype, device=block.device)
        # (K + lam I + U kernel U^T)^-1 = inverse - columns step columns^T
        step = torch.linalg.solve(unit + change.kernel @ block, change.kernel)
        solved = change.missing - step @ (block @ change.missing)
        energy = ((columns @ (solved @ solved.T)) * columns).sum(1)
        diagonal = self.inverse.diagonal() - ((columns @ step) * columns).sum(1)
        # Never below zero but for rounding: it is a sum of squares.
        return float((energy / diagonal.square()).sum().clamp(min=0))

    def _change(self, experts: Sequence[int], slot: ExpertWeights | None) -> SlotChange:
        evidence, gone = self.evidence, list(experts)
        visits = evidence.gates[:, gone].ne(0).any(1).nonzero().squeeze(1)
        parts = [(evidence.weights, expert, [expert], -1) for expert in gone]
        if slot is not None:
            parts.append((slot, 0, gone, 1))
        kernel = self.inverse.new_zeros(len(visits), len(visits))
        missing = self.inverse.new_zeros(len(visits), evidence.sample.states.shape[1])
        for weights, expert, members, sign in parts:
            seen = _seen(evidence, members, visits)
            features = _features(seen, weights, expert)
            kernel += sign * (features @ features.T)
            missing -= sign * (features @ weights.down_proj[expert].double().T)
            if weights.down_bias is not None:
                bias = weights.down_bias[expert].double()
                missing -= sign * seen.gates.double().sum(1, keepdim=True) * bias
        return SlotChange(visits, kernel, missing)


def _seen(evidence: Evidence, members: list[int], visits: Int64[Tensor, " _"]) -> GroupTokens:
    """Some tokens, as experts that share a slot see them."""
    gates = evidence.gates[visits][:, members]
    return GroupTokens(evidence.sample.states[visits], gates, evidence.activate)


def _features(
    seen: GroupTokens, weights: ExpertWeights, expert: int
) -> Float64[Tensor, "_ intermediate"]:
    """Activations of an expert under the summed routing weights of all that share its slot."""
    gate = seen.gates.double().sum(1, keepdim=True)
    return gate * weights.activations(seen.states, expert, seen.activate).double()
