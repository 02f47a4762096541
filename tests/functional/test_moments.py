"""Products of features and targets against loops over tokens."""

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.moments import Moments

NUM_TOKENS, NUM_FEATURES, NUM_OUTPUTS = 20, 6, 3
GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(20, 6, generator=GENERATOR)
TARGETS = torch.randn(20, 3, generator=GENERATOR)
CPU = torch.device("cpu")


def summed(
    *batches: tuple[Tensor, Tensor], blocks: list[tuple[slice, Tensor | slice]] | None = None
) -> Moments:
    moments = Moments.zeros(NUM_FEATURES, NUM_OUTPUTS, CPU)
    for features, targets in batches:
        if blocks is None:
            moments.add(features, targets)
        else:
            moments.add(features, targets, blocks)
    return moments


def assert_same(actual: Moments, expected: Moments) -> None:
    torch.testing.assert_close(actual.gram, expected.gram, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.cross, expected.cross, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.energy, expected.energy)


def test_sums_equal_a_loop_over_tokens() -> None:
    gram = torch.zeros(NUM_FEATURES, NUM_FEATURES, dtype=torch.float64)
    cross = torch.zeros(NUM_OUTPUTS, NUM_FEATURES, dtype=torch.float64)
    energy = torch.zeros((), dtype=torch.float64)
    for token in range(NUM_TOKENS):
        feature, target = FEATURES[token].double(), TARGETS[token].double()
        for i in range(NUM_FEATURES):
            gram[i] += feature[i] * feature
        for i in range(NUM_OUTPUTS):
            cross[i] += target[i] * feature
            energy += target[i] ** 2
    assert_same(summed((FEATURES, TARGETS)), Moments(gram, cross, energy))


def test_sums_do_not_depend_on_batches_or_their_order() -> None:
    parts = list(zip(FEATURES.split(7), TARGETS.split(7), strict=True))
    assert_same(summed(*reversed(parts)), summed((FEATURES, TARGETS)))


def test_a_batch_without_tokens_adds_nothing() -> None:
    whole = summed((FEATURES, TARGETS), (FEATURES[:0], TARGETS[:0]))
    assert torch.equal(whole.gram, summed((FEATURES, TARGETS)).gram)


def test_blocks_name_all_that_is_not_zero_and_change_nothing() -> None:
    rows = torch.tensor([0, 3, 4, 11])
    features = FEATURES.clone()
    outside = torch.ones(NUM_TOKENS, dtype=torch.bool)
    outside[rows] = False
    features[outside, :2] = 0
    features[:, 2:4] = 0
    blocks: list[tuple[slice, Tensor | slice]] = [
        (slice(0, 2), rows),
        (slice(4, None), slice(None)),
    ]
    assert_same(
        summed((features, TARGETS), blocks=blocks),
        summed((features, TARGETS)),
    )


def test_half_precision_is_summed_in_float64() -> None:
    half = (FEATURES.bfloat16(), TARGETS.bfloat16())
    moments = summed(half)
    assert {t.dtype for t in (moments.gram, moments.cross, moments.energy)} == {torch.float64}
    assert_same(moments, summed((half[0].float(), half[1].float())))


def test_small_tokens_are_not_lost_beside_a_large_sum() -> None:
    # One part in 1e9 is below the 6e-8 that float32 can tell apart.
    large = (3e4 * torch.ones(1, NUM_FEATURES), 3e4 * torch.ones(1, NUM_OUTPUTS))
    small = (torch.ones(1, NUM_FEATURES), torch.ones(1, NUM_OUTPUTS))
    moments = summed(large, small)
    assert torch.equal(moments.gram, torch.full_like(moments.gram, 9e8 + 1))
    assert torch.equal(moments.cross, torch.full_like(moments.cross, 9e8 + 1))
    assert moments.energy.item() == 3 * (9e8 + 1)


def test_the_error_is_the_squared_error_relative_to_the_targets() -> None:
    weights = torch.randn(NUM_OUTPUTS, NUM_FEATURES, generator=torch.Generator().manual_seed(1))
    wrong = FEATURES.double() @ weights.double().T - TARGETS.double()
    expected = wrong.square().sum() / TARGETS.double().square().sum()
    found = summed((FEATURES, TARGETS)).error(weights)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_weights_that_make_the_targets_have_no_error() -> None:
    weights = torch.ones(NUM_OUTPUTS, NUM_FEATURES)
    error = summed((FEATURES, FEATURES @ weights.T)).error(weights)
    assert abs(error.item()) < 1e-6


@pytest.mark.parametrize("factor", [1, 3])
def test_reducing_applies_to_every_sum(factor: int) -> None:
    moments = summed((FEATURES, TARGETS))
    reduced = moments.reduced(lambda tensor: factor * tensor)
    assert torch.equal(reduced.gram, factor * moments.gram)
    assert torch.equal(reduced.cross, factor * moments.cross)
    assert torch.equal(reduced.energy, factor * moments.energy)
