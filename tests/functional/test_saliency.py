"""Saliency against loops over single tokens."""

import torch
from torch import Tensor

from lightning_smoe.functional.saliency import Frequency, GateMass, Reap, ReapSum
from lightning_smoe.functional.sums import ExpertSums

# Tokens by experts: routing weight where the token is routed to the expert, else zero. The last
# expert is never visited.
GATES = torch.tensor(
    [[0.7, 0.3, 0, 0], [0.6, 0, 0.4, 0], [0.9, 0.1, 0, 0], [0, 0.5, 0.5, 0]], dtype=torch.float64
)
OUTPUTS = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sums() -> ExpertSums:
    norm = OUTPUTS.norm(dim=-1)
    routed = GATES > 0
    return ExpertSums(
        num_tokens=torch.tensor(len(GATES)),
        count=routed.sum(0),
        gate_sum=GATES.sum(0),
        output_norm_sum=(norm * routed).sum(0),
        gated_norm_sum=(norm * GATES).sum(0),
        logit_gram=torch.eye(4, dtype=torch.float64),
    )


def scores_of_routed_tokens(expert: int) -> list[float]:
    return [
        float(GATES[token, expert] * OUTPUTS[token, expert].norm())
        for token in range(len(GATES))
        if GATES[token, expert] > 0
    ]


def assert_equals(scores: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))


def test_frequency_is_the_fraction_of_tokens_that_visit() -> None:
    assert_equals(Frequency()(sums()), [3 / 4, 3 / 4, 2 / 4, 0])


def test_gate_mass_adds_up_routing_weights() -> None:
    assert_equals(GateMass()(sums()), [2.2, 0.9, 0.9, 0])


def test_reap_is_the_mean_weighted_norm_of_routed_tokens() -> None:
    loop = [scores_of_routed_tokens(expert) for expert in range(4)]
    assert_equals(Reap()(sums()), [sum(s) / len(s) if s else 0.0 for s in loop])


def test_reap_sum_is_the_summed_weighted_norm_of_routed_tokens() -> None:
    assert_equals(ReapSum()(sums()), [sum(scores_of_routed_tokens(e)) for e in range(4)])
