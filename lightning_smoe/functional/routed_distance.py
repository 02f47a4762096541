"""Distances that see how the router uses two experts, beside what they put out."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from lightning_smoe.functional.distance import Distance, cosines, tidy
from lightning_smoe.functional.evidence import Evidence


@dataclass(frozen=True)
class GatedCosine(Distance):
    """One minus the mean of two cosines: of router logits, and of router-weighted outputs (REAM).

    With `l` the logits over all tokens and p their softmax over all experts, the similarity of
    https://arxiv.org/abs/2604.04356 (Eq. 7; halved here, so that distances start at zero) is
    `cos(l_i, l_j) + E_x cos(p_i(x) f_i(x), p_j(x) f_j(x))`. Weights cancel in that second cosine,
    which leaves Sub-MoE's; the authors' code instead takes `cos(E_x p_i f_i, E_x p_j f_j)`, where
    they count. Of a selection of experts, p is the softmax over those alone.

    Args:
        average: What is averaged over the sampled tokens: `cosines`, as the paper says, or
            `outputs`, as its code does.
    """

    average: Literal["cosines", "outputs"] = "cosines"

    def __call__(self, evidence: Evidence) -> Float64[Tensor, "experts experts"]:
        if self.average == "cosines":
            by_output = evidence.pairs.cosine / evidence.sample.num_tokens
        else:
            total = evidence.output_sums.weighted
            by_output = cosines(total @ total.mT)
        return tidy(1 - (cosines(evidence.sums.logit_gram) + by_output) / 2)


@dataclass(frozen=True)
class RoutedMerge(Distance):
    """Mean squared error that merging two experts leaves, at the best constant mixture of outputs.

    One slot with the weight `g_i + g_j` that puts out `a f_i + (1 - a) f_j` is wrong by
    `min_a E_x[(g_i - a (g_i + g_j))^2 ||f_i - f_j||^2]`. With `A = E_x[g_i^2 D]`,
    `B = E_x[g_j^2 D]`, `C = E_x[g_i g_j D]` and `D = ||f_i - f_j||^2` this is
    `(A B - C^2) / (A + B + 2 C)`: Eq. 5 of REAP (https://arxiv.org/abs/2510.13999) without its
    approximations, in squared hidden-state units, over the sampled tokens. Zero for experts that
    are equal, or unused, or always weighted in one proportion; it is a cost and no metric.
    """

    def __call__(self, evidence: Evidence) -> Float64[Tensor, "experts experts"]:
        own, joint = evidence.pairs.own_distance, evidence.pairs.joint_distance
        other = own.mT
        total = own + other + 2 * joint
        cost = torch.where(total > 0, (own * other - joint.square()) / total, 0.0)
        return tidy(cost / evidence.sample.num_tokens)
