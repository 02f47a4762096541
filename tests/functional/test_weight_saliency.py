"""Importance from weights alone."""

import math

import pytest
import torch

from lightning_smoe.functional.weight_saliency import Aimer
from tests.functional.layers import evidence_of, random_weights


@pytest.mark.parametrize(("gated", "biased"), [(True, False), (True, True), (False, True)])
def test_aimer_follows_its_formula(gated: bool, biased: bool) -> None:
    weights = random_weights(gated=gated, biased=biased)
    expected = []
    for expert in range(6):
        numbers: list[float] = []
        for matrices in (weights.gate_proj, weights.up_proj, weights.down_proj):
            numbers += [] if matrices is None else matrices[expert].flatten().tolist()
        mean = sum(abs(number) for number in numbers) / len(numbers)
        root = math.sqrt(sum(number**2 for number in numbers) / len(numbers))
        expected.append(1 - mean / root)
    scores = Aimer()(evidence_of(weights))
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))


def test_aimer_sees_neither_router_nor_text() -> None:
    weights = random_weights()
    assert torch.equal(Aimer()(evidence_of(weights)), Aimer()(evidence_of(weights, seed=8)))


def test_aimer_prunes_the_most_even_weights_first() -> None:
    weights = random_weights()
    for matrices in (weights.gate_proj, weights.up_proj, weights.down_proj):
        assert matrices is not None
        matrices[1] = 0.5 * matrices[1].sign()
        matrices[2] = 0
        matrices[3] = 100 * matrices[4]
    scores = Aimer()(evidence_of(weights))
    torch.testing.assert_close(scores[1:3], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(scores[3], scores[4])
    assert bool((scores[[0, 3, 4, 5]] > 0.1).all())
