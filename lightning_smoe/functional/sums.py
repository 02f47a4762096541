"""Additive sums of what the experts of one layer did: all that criteria and distances need."""

from dataclasses import dataclass, fields

from jaxtyping import Float64, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ExpertSums:
    """Sums over calibration tokens of one layer; leading axes, if any, are domains.

    Notation: g is the routing weight of an expert for a token that was routed to it, f(x) its
    output before that weight, l the router's logits. Sums of "all" are over every token, also
    those not routed to the expert; they are none where calibration computed routed tokens only.

    Args:
        num_tokens: Tokens seen.
        count: Tokens routed to each expert.
        gate_sum: Sum of g over the routed tokens.
        output_norm_sum: Sum of ||f(x)|| over the routed tokens, in hidden-state units.
        gated_norm_sum: Sum of g ||f(x)|| over the routed tokens.
        logit_gram: Sum of l l^T over all tokens.
        output_sum: Sum of f(x) over all tokens.
        output_gram: Sum of f_i(x) . f_j(x) over all tokens.
        output_cosine: Sum of cos(f_i(x), f_j(x)) over all tokens.
    """

    num_tokens: Int64[Tensor, "..."]
    count: Int64[Tensor, "... experts"]
    gate_sum: Float64[Tensor, "... experts"]
    output_norm_sum: Float64[Tensor, "... experts"]
    gated_norm_sum: Float64[Tensor, "... experts"]
    logit_gram: Float64[Tensor, "... experts experts"]
    output_sum: Float64[Tensor, "... experts hidden"] | None = None
    output_gram: Float64[Tensor, "... experts experts"] | None = None
    output_cosine: Float64[Tensor, "... experts experts"] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Returns the sums that were gathered, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def pooled(self) -> "ExpertSums":
        """Adds up the domains on the first axis."""
        return ExpertSums(**{name: tensor.sum(0) for name, tensor in self.tensors().items()})
