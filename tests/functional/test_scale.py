"""The scale of a layer against loops over tokens, and against the outputs of experts."""

import math

import pytest
import torch

from lightning_smoe.functional.scale import OutputProducts, ScaleRepair, scale_outputs
from tests.functional.layers import random_weights, swiglu

GENERATOR = torch.Generator().manual_seed(0)
WANTED = torch.randn(30, 8, generator=GENERATOR)
GIVEN = 0.5 * WANTED + 0.1 * torch.randn(30, 8, generator=GENERATOR)
REPAIRS = [ScaleRepair(), ScaleRepair("norm")]


def products_of(wanted: torch.Tensor, given: torch.Tensor, size: int = 30) -> OutputProducts:
    products = OutputProducts.zeros(wanted.device)
    for y, z in zip(wanted.split(size), given.split(size), strict=True):
        products.add(y, z)
    return products


def test_products_are_summed_over_tokens_whatever_the_batches() -> None:
    for size in (30, 7):
        products = products_of(WANTED, GIVEN, size)
        cross = sum(float(y @ z) for y, z in zip(WANTED.double(), GIVEN.double(), strict=True))
        wanted = sum(float(y @ y) for y in WANTED.double())
        given = sum(float(z @ z) for z in GIVEN.double())
        assert products.cross.item() == pytest.approx(cross)
        assert products.wanted.item() == pytest.approx(wanted)
        assert products.given.item() == pytest.approx(given)


def test_the_projection_is_least_squares() -> None:
    expected = torch.linalg.lstsq(GIVEN.reshape(-1, 1), WANTED.reshape(-1, 1)).solution.item()
    assert ScaleRepair()(products_of(WANTED, GIVEN)) == pytest.approx(expected, rel=1e-5)


def test_the_norm_gives_the_size_that_is_wanted() -> None:
    scale = ScaleRepair("norm")(products_of(WANTED, GIVEN))
    assert (scale * GIVEN).norm().item() == pytest.approx(WANTED.norm().item(), rel=1e-5)


@pytest.mark.parametrize("repair", REPAIRS, ids=str)
def test_an_output_that_is_right_up_to_a_factor_becomes_right(repair: ScaleRepair) -> None:
    assert repair(products_of(WANTED, WANTED / 3)) == pytest.approx(3)
    assert repair(products_of(WANTED, WANTED)) == pytest.approx(1)


@pytest.mark.parametrize("repair", REPAIRS, ids=str)
def test_a_layer_that_gives_nothing_is_left_alone(repair: ScaleRepair) -> None:
    assert repair(products_of(WANTED, torch.zeros(30, 8))) == 1
    assert repair(products_of(WANTED[:0], GIVEN[:0])) == 1


@pytest.mark.parametrize("repair", REPAIRS, ids=str)
def test_sums_of_two_processes_give_the_scale_of_one(repair: ScaleRepair) -> None:
    first, second = products_of(WANTED[:11], GIVEN[:11]), products_of(WANTED[11:], GIVEN[11:])
    others = iter((second.cross, second.wanted, second.given))
    both = first.reduced(lambda tensor: tensor + next(others))
    assert repair(both) == pytest.approx(repair(products_of(WANTED, GIVEN)))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_scaled_experts_give_scaled_outputs(gated: bool, biased: bool) -> None:
    weights = random_weights(gated=gated, biased=biased)
    before = random_weights(gated=gated, biased=biased)
    scaled = scale_outputs(weights, math.pi)
    states = torch.randn(9, 8, generator=GENERATOR, dtype=torch.float64)
    for expert in range(6):
        expected = math.pi * weights.outputs(states, expert, swiglu)
        torch.testing.assert_close(scaled.outputs(states, expert, swiglu), expected)
    assert torch.equal(weights.down_proj, before.down_proj)


def test_scaled_experts_keep_their_dtype() -> None:
    scaled = scale_outputs(random_weights(biased=True, dtype=torch.bfloat16), 0.3)
    assert scaled.down_bias is not None
    assert scaled.down_proj.dtype == scaled.down_bias.dtype == torch.bfloat16
