"""Nonlinear mixing against loops over entries, and against what it must minimise."""

import math

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.interpolation import Karcher, Ties
from lightning_smoe.functional.merging import Average
from tests.functional.groups import KINDS, SHARES, group_of
from tests.weights import parts


def neurons_of(members: ExpertWeights) -> list[Tensor]:
    """Members by neurons by entries, for each matrix."""
    stacked = [members.gate_proj, members.up_proj, members.down_proj.mT]
    return [matrices for matrices in stacked if matrices is not None]


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Spherical linear interpolation of directions, linear interpolation of lengths."""
    a, b = first / first.norm(), second / second.norm()
    angle = torch.acos(a @ b)
    direction = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / angle.sin()
    mean: Tensor = ((1 - share) * first.norm() + share * second.norm()) * direction
    return mean


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_two_is_spherical_linear_interpolation(kind: str) -> None:
    members = group_of(kind, 2)
    merged = Karcher()(members, torch.tensor([3.0, 1.0]))
    for ours, pair in zip(neurons_of(merged), neurons_of(members), strict=True):
        for neuron in range(5):
            expected = slerp(pair[0, neuron], pair[1, neuron], 0.25)
            torch.testing.assert_close(ours[0, neuron], expected, rtol=0, atol=1e-5)


def test_whole_matrices_are_interpolated_as_one_vector() -> None:
    members = group_of("gated", 2)
    merged = Karcher(vector="matrix")(members, torch.tensor([1.0, 1.0]))
    for ours, pair in zip(neurons_of(merged), neurons_of(members), strict=True):
        expected = slerp(pair[0].flatten(), pair[1].flatten(), 0.5)
        torch.testing.assert_close(ours.flatten(), expected, rtol=0, atol=1e-5)


def test_the_mean_of_several_has_the_smallest_squared_angles() -> None:
    members = group_of("gated", dtype=torch.float64)
    merged = Karcher()(members, SHARES).up_proj[0]
    generator = torch.Generator().manual_seed(0)

    def cost(neuron: int, vector: Tensor) -> float:
        cosines = torch.cosine_similarity(members.up_proj[:, neuron], vector, dim=1)
        return float((SHARES * cosines.acos().square()).sum())

    for neuron in range(5):
        least = cost(neuron, merged[neuron])
        for _ in range(20):
            change = 0.01 * torch.randn(8, generator=generator, dtype=torch.float64)
            assert cost(neuron, merged[neuron] + change) > least
        lengths = members.up_proj[:, neuron].norm(dim=1)
        expected = float((SHARES * lengths).sum() / SHARES.sum())
        assert float(merged[neuron].norm()) == pytest.approx(expected)


def test_unrelated_neurons_keep_their_length_which_the_average_loses() -> None:
    up = torch.eye(4, 8).repeat(2, 1, 1)
    up[1] = up[1].roll(4, dims=1)
    members = ExpertWeights(up, torch.ones(2, 8, 4))
    weights = torch.ones(2)
    torch.testing.assert_close(Karcher()(members, weights).up_proj.norm(dim=2), torch.ones(1, 4))
    assert float(Average()(members, weights).up_proj.norm(dim=2).max()) < 0.71


@pytest.mark.parametrize("vector", ["neuron", "matrix"])
def test_members_that_cancel_out_leave_the_heaviest_direction(vector: str) -> None:
    expert = group_of("gated", 1)
    pair = ExpertWeights.stack([expert, expert.map(torch.neg)])
    for weights, sign in (([1.0, 1.0], 1), ([1.0, 1.0 + 1e-7], -1)):
        merged = Karcher(vector)(pair, torch.tensor(weights))  # type: ignore[arg-type]
        torch.testing.assert_close(merged.up_proj, sign * expert.up_proj, rtol=0, atol=1e-5)


def test_neurons_that_are_zero_have_no_say_in_the_direction() -> None:
    expert = group_of("gated", 1)
    pair = ExpertWeights.stack([expert.map(torch.zeros_like), expert])
    merged = Karcher()(pair, torch.ones(2))
    torch.testing.assert_close(merged.up_proj, expert.up_proj / 2)
    nothing = pair.map(torch.zeros_like)
    assert not Karcher()(nothing, torch.ones(2)).up_proj.any()


def ties(members: Tensor, shares: Tensor, density: float) -> Tensor:
    """Entry by entry, the first member being the heaviest."""
    first, others = members[0].flatten(), members[1:].flatten(1)
    kept = math.ceil(density * len(first))
    changes = [other - first for other in others]
    for change in changes:
        smallest_kept = sorted(abs(float(c)) for c in change)[-kept]
        change[change.abs() < smallest_kept] = 0
    merged = first.clone()
    for entry in range(len(first)):
        vote = sum(float(s) * float(c[entry]) for s, c in zip(shares[1:], changes, strict=True))
        total, share = 0.0, float(shares[0])
        for s, change in zip(shares[1:], changes, strict=True):
            if vote * float(change[entry]) > 0:
                total += float(s) * float(change[entry])
                share += float(s)
        merged[entry] += total / share
    return merged.view_as(members[0])


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_large_differences_that_the_others_agree_on_are_added(kind: str, density: float) -> None:
    members, weights = group_of(kind, 4), torch.tensor([4.0, 3.0, 2.0, 1.0])
    merged = Ties(density)(members, weights)
    for ours, part in zip(parts(merged), parts(members), strict=True):
        expected = ties(part, weights / 10, density)
        torch.testing.assert_close(ours[0], expected, rtol=0, atol=1e-6)


def test_of_two_members_whose_differences_all_stay_it_is_the_average() -> None:
    members, weights = group_of(num_members=2), torch.tensor([1.0, 2.0])
    merged, mean = Ties(density=1.0)(members, weights), Average()(members, weights)
    for ours, theirs in zip(parts(merged), parts(mean), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("density", [0.0, 1.1, -1.0, float("nan")])
def test_a_density_that_is_no_fraction_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        Ties(density)
