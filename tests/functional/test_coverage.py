"""Greedy D-optimal selection against determinants of every candidate set."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.coverage import Coverage, greedy_gains
from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.saliency import ReapEnergy
from tests.functional.layers import evidence_of, random_weights


def log_det(gram: Tensor, chosen: list[int]) -> float:
    """log det(I + K_S) of the chosen experts."""
    return float(torch.logdet(torch.eye(len(chosen)).double() + gram[chosen][:, chosen]))


def gains_by_trying_all(gram: Tensor) -> list[float]:
    """Adds the best expert again and again, with a whole determinant for every candidate."""
    chosen: list[int] = []
    gains = [0.0] * len(gram)
    while len(chosen) < len(gram):
        before = log_det(gram, chosen) if chosen else 0.0
        rest = [expert for expert in range(len(gram)) if expert not in chosen]
        best = max(rest, key=lambda expert: log_det(gram, [*chosen, expert]))
        gains[best] = log_det(gram, [*chosen, best]) - before
        chosen.append(best)
    return gains


def scaled_gram(evidence: Evidence, strength: float) -> Tensor:
    """K / lam, token by token."""
    sample, number = evidence.sample, evidence.num_experts
    outputs = [
        evidence.weights.outputs(sample.states, expert, evidence.activate)
        for expert in range(number)
    ]
    gram = torch.zeros(number, number, dtype=torch.float64)
    for token, gates in enumerate(sample.gates.tolist()):
        for i, j in product(range(number), repeat=2):
            gram[i, j] += gates[i] * gates[j] * (outputs[i][token] @ outputs[j][token])
    return gram / (strength * gram.diagonal().mean())


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("biased", [False, True])
def test_coverage_is_the_gain_of_the_greedy_design(strength: float, biased: bool) -> None:
    evidence = evidence_of(random_weights(gated=not biased, biased=biased), top_k=3)
    expected = gains_by_trying_all(scaled_gram(evidence, strength))
    scores = Coverage(strength)(evidence)
    # The products of outputs are formed in float32.
    torch.testing.assert_close(
        scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5
    )


def test_gains_fall_and_add_up_to_the_determinant() -> None:
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = rows @ rows.T
    gains = greedy_gains(gram)
    assert float(gains.sum()) == pytest.approx(log_det(gram, list(range(9))))
    torch.testing.assert_close(
        gains, torch.tensor(gains_by_trying_all(gram), dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


def test_of_two_experts_that_always_say_the_same_the_second_is_worth_little() -> None:
    gram = torch.tensor([[4.0, 4, 0], [4, 4, 0], [0, 0, 2]], dtype=torch.float64)
    twins = greedy_gains(gram)
    assert float(twins[0]) == pytest.approx(math.log(5))
    assert float(twins[1]) < float(twins[2]) < float(twins[0])


def test_an_expert_that_no_token_visits_adds_nothing() -> None:
    scores = Coverage()(evidence_of(random_weights(), unvisited=2))
    assert float(scores[2]) == 0
    assert bool((scores >= 0).all())


def test_a_layer_that_says_nothing_has_no_coverage() -> None:
    weights = random_weights()
    weights.down_proj.zero_()
    assert torch.equal(Coverage()(evidence_of(weights)), torch.zeros(6, dtype=torch.float64))


def test_the_order_of_the_experts_does_not_matter() -> None:
    evidence = evidence_of(random_weights())
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    torch.testing.assert_close(Coverage()(evidence.select(order)), Coverage()(evidence)[order])


def test_a_strong_prior_sorts_by_energy() -> None:
    evidence = evidence_of(random_weights())
    scores = Coverage(strength=1e4)(evidence)
    assert torch.equal(scores.argsort(), ReapEnergy()(evidence).argsort())


def test_a_strength_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="strength=0"):
        Coverage(0.0)
