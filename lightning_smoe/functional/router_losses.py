"""What a router may be trained for: its probabilities, their divergence, balance and size."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from lightning_smoe.functional.routing import Score

# One unit in the last place of bfloat16, to which routing weights may have been rounded.
_TOLERANCE = 2.0**-8


def router_score(
    logits: Float[Tensor, "tokens rows"],
    selected: Int[Tensor, "tokens top_k"],
    weights: Float[Tensor, "tokens top_k"],
) -> Score:
    """Finds what makes a logit a weight, from what a router did.

    It is the sigmoid where that alone gives the weights; a rule of its own (Phi-3.5-MoE, whose
    weights are softmaxes over logits near the largest) counts as softmax.

    Args:
        logits: The router's raw scores.
        selected: The selected rows.
        weights: Their routing weights, on any scale.
    """
    chosen = logits.detach().double().gather(1, selected.long())
    found = weights.detach().double()
    found = found / found.sum(1, keepdim=True)
    sigmoid = chosen.sigmoid() / chosen.sigmoid().sum(1, keepdim=True)
    errors = [(found - wanted).norm() for wanted in (chosen.softmax(1), sigmoid)]
    is_sigmoid = errors[1] < torch.minimum(errors[0], _TOLERANCE * found.norm())
    return "sigmoid" if bool(is_sigmoid) else "softmax"


def router_log_probs(
    logits: Float[Tensor, "tokens rows"], score: Score
) -> Float[Tensor, "tokens rows"]:
    """Log-probabilities of router rows that sum to one, whatever makes a logit a weight."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return log_softmax(wide if score == "softmax" else logsigmoid(wide), dim=-1)


def sum_by_group(
    log_probs: Float[Tensor, "tokens rows"], groups: Int[Tensor, " rows"], num_groups: int
) -> Float[Tensor, "tokens groups"]:
    """Log of the probability of each group of rows.

    Args:
        log_probs: Log-probabilities of rows.
        groups: The group of each row, best on the CPU, where looking at it waits for nothing; the
            mass of a row with group -1 is left out, and the rest scaled to sum to one.
        num_groups: How many groups there are; one without any row gets minus infinity.
    """
    kept = (groups >= 0).nonzero().squeeze(1)
    if len(kept) < len(groups):
        groups = groups[kept]
        log_probs = log_softmax(log_probs.index_select(1, kept.to(log_probs.device)), dim=-1)
    if groups.tolist() == list(range(num_groups)):
        return log_probs
    index = groups.to(log_probs.device, torch.int64).expand_as(log_probs)
    largest = log_probs.new_full((len(log_probs), num_groups), -torch.inf)
    largest = largest.scatter_reduce(1, index, log_probs.detach(), "amax")
    # Where a group has no row, anything finite will do: the logarithm of its sum is infinite.
    largest = largest.masked_fill(largest.isinf(), 0.0)
    shifted = (log_probs - largest.gather(1, index)).exp()
    return torch.zeros_like(largest).scatter_add(1, index, shifted).log() + largest


def router_divergence(
    teacher: Float[Tensor, "tokens groups"], student: Float[Tensor, "tokens groups"]
) -> Float[Tensor, " tokens"]:
    """KL(teacher || student) between log-probabilities, in nats; a group without mass adds none."""
    masses = teacher.exp()
    # Both minus infinity have no difference, and a gradient through it would be no number.
    differences = (teacher - student).masked_fill(masses == 0, 0.0)
    return (masses * differences).sum(-1)


def load_balance(
    probs: Float[Tensor, "tokens experts"], load: Float[Tensor, " experts"]
) -> Float[Tensor, " tokens"]:
    """Each token's share in the loss that evens out loads (https://arxiv.org/abs/2101.03961).

    The mean over tokens is `E * sum_e f_e * P_e`, where `f` is the fraction of all selections and
    `P` the mean probability. Equal loads give 1 for every top_k; transformers counts `f` by token,
    so its value is top_k times as large.

    Args:
        probs: The router's probabilities, summing to one.
        load: Fraction of all selections, over the tokens of all processes, summing to one.
    """
    return probs @ load.to(probs.dtype) * len(load)


def router_z(logits: Float[Tensor, "tokens rows"]) -> Float[Tensor, " tokens"]:
    """Squared log of the sum of exponentials of the logits (https://arxiv.org/abs/2202.08906)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.logsumexp(-1).square()
