"""Additive sums of what the experts of one layer did: all that criteria without outputs need."""

from dataclasses import dataclass, fields

from jaxtyping import Float64, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ExpertSums:
    """Sums over all calibration tokens of one layer; leading axes, if any, are domains.

    Notation: g is the routing weight of an expert for a token that was routed to it, f(x) its
    output before that weight, l the router's logits. All but `logit_gram` run over the tokens that
    were routed to the expert.

    Args:
        num_tokens: Tokens seen.
        count: Tokens routed to each expert.
        gate_sum: Sum of g.
        output_norm_sum: Sum of ||f(x)||, in hidden-state units.
        gated_norm_sum: Sum of g ||f(x)||.
        output_energy_sum: Sum of ||f(x)||^2.
        gated_energy_sum: Sum of g^2 ||f(x)||^2.
        output_sum: Sum of f(x).
        output_max: Largest |f(x)| of any token and any hidden dimension; not a sum but a maximum.
        logit_gram: Sum of l l^T over all tokens.
    """

    num_tokens: Int64[Tensor, "..."]
    count: Int64[Tensor, "... experts"]
    gate_sum: Float64[Tensor, "... experts"]
    output_norm_sum: Float64[Tensor, "... experts"]
    gated_norm_sum: Float64[Tensor, "... experts"]
    output_energy_sum: Float64[Tensor, "... experts"]
    gated_energy_sum: Float64[Tensor, "... experts"]
    output_sum: Float64[Tensor, "... experts hidden"]
    output_max: Float64[Tensor, "... experts"]
    logit_gram: Float64[Tensor, "... experts experts"]

    def tensors(self) -> dict[str, Tensor]:
        """Returns the sums by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def pooled(self) -> "ExpertSums":
        """Adds up the domains on the first axis."""
        return ExpertSums(
            **{k: t.amax(0) if k in MAXIMA else t.sum(0) for k, t in self.tensors().items()}
        )

    def select(self, experts: Int64[Tensor, " members"]) -> "ExpertSums":
        """Takes the named experts, in that order; the sums must have no domain axis."""
        chosen = {k: t if k == "num_tokens" else t[experts] for k, t in self.tensors().items()}
        chosen["logit_gram"] = chosen["logit_gram"][:, experts]
        return ExpertSums(**chosen)


# Fields that are the largest of their parts rather than the sum.
MAXIMA = ("output_max",)
