"""The guard of experts with massive activations."""

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.super_experts import super_experts


def layers(num_layers: int = 10, num_experts: int = 64) -> list[Tensor]:
    """Largest outputs between one and two."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_layers, num_experts)
    return list(1 + torch.rand(*shape, generator=generator, dtype=torch.float64))


def named(found: list[Tensor]) -> list[tuple[int, int]]:
    return [(layer, expert) for layer, experts in enumerate(found) for expert in experts.tolist()]


def test_massive_experts_are_named_with_their_layers() -> None:
    output_max = layers()
    output_max[1][7] = 500.0
    output_max[3][[2, 60]] = torch.tensor([90.0, 300.0], dtype=torch.float64)
    assert named(super_experts(output_max)) == [(1, 7), (3, 2), (3, 60)]


def test_an_expert_far_below_the_largest_is_not_massive() -> None:
    output_max = layers()
    output_max[1][7] = 500.0
    output_max[3][2] = 49.0
    assert named(super_experts(output_max)) == [(1, 7)]


def test_thresholds_follow_their_formula() -> None:
    output_max = layers()
    every = sorted(float(value) for layer in output_max for value in layer)
    place = 0.995 * (len(every) - 1)
    low = every[int(place)]
    quantile = low + (place - int(place)) * (every[int(place) + 1] - low)
    threshold = max(quantile, 0.1 * every[-1])
    expected = [
        (number, expert)
        for number, layer in enumerate(output_max)
        for expert, value in enumerate(layer.tolist())
        if value > threshold
    ]
    assert len(expected) == 4
    assert named(super_experts(output_max)) == expected


def test_experts_beyond_the_depth_count_but_are_not_named() -> None:
    output_max = layers(num_layers=4)
    output_max[0][1] = 60.0
    output_max[3][5] = 500.0
    assert named(super_experts(output_max)) == [(0, 1), (3, 5)]
    assert named(super_experts(output_max, depth=0.75)) == [(0, 1)]


def test_layers_may_have_different_numbers_of_experts() -> None:
    output_max = [torch.ones(4).double(), torch.ones(7).double(), torch.ones(2).double()]
    output_max[1][6] = 3.0
    assert named(super_experts(output_max)) == [(1, 6)]


def test_equal_experts_are_not_massive() -> None:
    assert named(super_experts([torch.ones(8).double()] * 3)) == []


@pytest.mark.parametrize("depth", [0.0, 1.5])
def test_a_depth_outside_the_model_is_refused(depth: float) -> None:
    with pytest.raises(ValueError, match="depth"):
        super_experts(layers(), depth)


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="0 layers"):
        super_experts([])
