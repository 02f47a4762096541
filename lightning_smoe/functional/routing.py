"""How a router turns logits into routing weights, found out from what it did."""

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Final, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lightning_smoe.errors import InputError
from lightning_smoe.functional.evidence import TokenSample

Score = Literal["softmax", "sigmoid"]

_SCORES: Final[tuple[Score, ...]] = ("softmax", "sigmoid")
# One unit in the last place of bfloat16, to which routing weights may have been rounded.
_TOLERANCE = 2.0**-8


@dataclass(frozen=True)
class RoutingRule:
    """How a router weighs the experts that it selects.

    Args:
        score: What makes a logit a weight; `softmax` runs over all experts that are there.
        normalize_weights: Whether the selected weights are scaled to sum to one.
        scale: Factor on all weights, above zero.
    """

    score: Score = "softmax"
    normalize_weights: bool = True
    scale: float = 1.0

    @property
    def is_shared_out(self) -> bool:
        """Whether an expert that is not selected takes weight away from those that are."""
        return self.score == "softmax" and not self.normalize_weights

    def weights(
        self, logits: Float[Tensor, "tokens experts"], selected: Int64[Tensor, "tokens top_k"]
    ) -> Float[Tensor, "tokens top_k"]:
        """Weighs selected experts.

        Args:
            logits: The router's raw scores; minus infinity for an expert that is not there.
            selected: The selected experts; one that is not there gets weight zero.
        """
        scores = logits.softmax(1) if self.score == "softmax" else logits.sigmoid()
        weights = scores.gather(1, selected)
        if self.normalize_weights:
            smallest = torch.finfo(weights.dtype).tiny
            weights = weights / weights.sum(1, keepdim=True).clamp_min(smallest)
        return self.scale * weights

    def gates_without(
        self, sample: TokenSample, kept: Bool[Tensor, " experts"]
    ) -> Float[Tensor, "tokens experts"]:
        """Routing weights when only some experts remain, each with its own row of the router.

        The selected experts that remain stay selected, and the places of the others go to those
        with the highest logits among the rest. That is what the router does if logits alone
        decide. Where a bias is added for the selection, or groups of experts are chosen first
        (DeepSeek-V3, ERNIE 4.5), who is selected is a guess and only the weights are exact.

        Args:
            sample: What the router did with all experts.
            kept: The experts that remain, at least one.

        Returns:
            Weight of every expert for every token, zero where it is not selected; float64.
        """
        logits = sample.router_logits.double().masked_fill(~kept, -torch.inf)
        top_k = min(sample.expert_indices.shape[1], int(kept.sum()))
        ranked = preference(sample).masked_fill(~kept, -torch.inf).topk(top_k).indices
        return torch.zeros_like(logits).scatter_(1, ranked, self.weights(logits, ranked))


def preference(sample: TokenSample) -> Float[Tensor, "tokens experts"]:
    """Ranks experts for each token: those that it selected first, then by logit; float64."""
    logits = sample.router_logits.double()
    span = logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True) + 1
    return logits.scatter_add(
        1, sample.expert_indices.long(), span.expand_as(sample.expert_indices)
    )


def infer_routing_rule(sample: TokenSample) -> RoutingRule:
    """Finds the rule that reproduces the routing weights of a sample from its logits.

    Args:
        sample: What the router did.

    Raises:
        InputError: No known rule comes within 0.4 percent (Phi-3.5-MoE has one of its own).
    """
    rules = [RoutingRule(score, normal) for score, normal in product(_SCORES, (True, False))]
    fits = [_fit(rule, sample) for rule in rules]
    error, rule = min(fits, key=lambda fit: fit[0])
    if not error <= _TOLERANCE:
        raise InputError(
            f"the routing weights follow no known rule: the nearest, {rule}, is off by "
            f"{100 * error:.3g} % over {sample.num_tokens} tokens. A criterion that sends tokens "
            "to other experts, such as LeaveOneOut, cannot be used here; choose another saliency"
        )
    return rule


def _fit(rule: RoutingRule, sample: TokenSample) -> tuple[float, RoutingRule]:
    """Fits the scale; returns the error relative to the weights, and the rule with that scale."""
    observed = sample.routing_weights.double()
    weights = rule.weights(sample.router_logits.double(), sample.expert_indices.long())
    scale = float((weights * observed).sum() / weights.square().sum())
    if abs(scale - 1) <= _TOLERANCE:
        scale = 1.0
    error = float((observed - scale * weights).norm() / observed.norm())
    return (torch.inf if math.isnan(error) else error), replace(rule, scale=scale)
