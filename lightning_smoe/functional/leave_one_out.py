"""Importance of experts by what the layer's output loses without each, one after the other."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lightning_smoe.functional.evidence import Evidence, TokenSample
from lightning_smoe.functional.routing import RoutingRule, infer_routing_rule, preference
from lightning_smoe.functional.saliency import Saliency


@dataclass(frozen=True)
class LeaveOneOut(Saliency):
    """Turn at which an expert goes when the least missed one is dropped again and again.

    From all experts S on, `argmin_j sum_x ||F_{S-j}(x) - F(x)||^2` leaves S, where F is the layer's
    routed output and F_{S-j} that of the remaining experts under the router's remaining rows: other
    experts are promoted and weights are formed anew (see `RoutingRule.gates_without`). This is the
    greedy form of NAEE (https://arxiv.org/abs/2402.14800), which tries all subsets of a size and
    adds up norms of whole calibration sequences rather than squared norms.

    Every expert runs on the tokens once; memory is `4 num_tokens num_experts^2` bytes (134 MB for
    128 experts), time grows with `num_tokens num_experts^2 top_k`. Turns rank the experts of one
    layer and say nothing across layers.

    Args:
        num_tokens: Tokens to try it on, spread evenly over the sample, at least 1; all of them if
            there are fewer.
    """

    num_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens={self.num_tokens} leaves nothing to try; give 1 or more")

    def __call__(self, evidence: Evidence) -> Float64[Tensor, " experts"]:
        if evidence.chosen_from is not None:
            layer, members = evidence.chosen_from
            # The router chooses among all; turns of a part rank that part as well.
            return self(layer)[members]
        rule = infer_routing_rule(evidence.sample)
        evidence = replace(evidence, sample=evidence.sample.thinned(self.num_tokens))
        grams = []
        for _, outputs in evidence.output_blocks():
            by_token = outputs.transpose(0, 1)
            grams.append(by_token @ by_token.mT)
        return _turns(rule, evidence.sample, torch.cat(grams))


def _turns(
    rule: RoutingRule, sample: TokenSample, gram: Float[Tensor, "tokens experts experts"]
) -> Float64[Tensor, " experts"]:
    """Drops expert after expert; of the outputs only each token's inner products are needed."""
    # Inner products with what the layer gives with all its experts.
    goal = (gram @ sample.gates.to(gram.dtype).unsqueeze(2)).squeeze(2).double()
    logits, ranks = sample.router_logits.double().clone(), preference(sample)
    number, top_k = logits.shape[1], sample.expert_indices.shape[1]
    turns = logits.new_full((number,), number - 1)
    for turn in range(number - 1):
        ranked = ranks.topk(min(top_k + 1, number - turn)).indices
        losses = _losses(rule, logits, ranked, top_k, gram=gram, goal=goal)
        gone = int(losses.masked_fill(ranks[0].isinf(), torch.inf).argmin())
        turns[gone] = turn
        ranks[:, gone] = logits[:, gone] = -torch.inf
    return turns


def _losses(
    rule: RoutingRule,
    logits: Float64[Tensor, "tokens experts"],
    ranked: Int64[Tensor, "tokens members"],
    top_k: int,
    *,
    gram: Float[Tensor, "tokens experts experts"],
    goal: Float64[Tensor, "tokens experts"],
) -> Float64[Tensor, " experts"]:
    """Squared error without each expert, up to a constant; without meaning for those already gone.

    `||sum_i w_i f_i - F||^2 = w K w - 2 w (K g) + ||F||^2`, with K one token's inner products.

    Args:
        rule: How weights are formed.
        logits: Minus infinity for experts that are gone.
        ranked: The selected experts, then the one that is promoted if one of them goes.
        top_k: Experts that a token visits.
        gram: Inner products K of the outputs.
        goal: Inner products K g with the original output.
    """
    token = torch.arange(len(ranked), device=ranked.device)[:, None, None]
    inner = gram[token, ranked[:, :, None], ranked[:, None, :]].double()
    near = goal.gather(1, ranked)

    def terms(weights: Tensor) -> tuple[Tensor, Tensor]:
        return torch.einsum("ti,tij,tj->t", weights, inner, weights), (weights * near).sum(1)

    selected = ranked[:, :top_k]
    quadratic, linear = terms(_padded(rule.weights(logits, selected), ranked.shape[1]))
    rise = torch.ones_like(logits)
    if rule.is_shared_out:
        rise = 1 / (1 - logits.softmax(1))
    change = rise.square() * quadratic[:, None] - 2 * rise * linear[:, None]
    for place in range(selected.shape[1]):
        one = selected[:, place : place + 1]
        quadratic, linear = terms(rule.weights(logits.scatter(1, one, -torch.inf), ranked))
        change.scatter_(1, one, (quadratic - 2 * linear)[:, None])
    return change.sum(0)


def _padded(
    weights: Float64[Tensor, "tokens top_k"], width: int
) -> Float64[Tensor, "tokens members"]:
    return torch.nn.functional.pad(weights, (0, width - weights.shape[1]))
