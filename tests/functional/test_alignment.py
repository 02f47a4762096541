"""Alignment undoes permutations and changes no expert's function."""

from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from lightning_smoe.functional.alignment import align_neurons
from lightning_smoe.functional.experts import ExpertWeights


def random_experts(
    num_experts: int, intermediate: int = 5, hidden: int = 4, plain: bool = False
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(num_experts, *shape, generator=generator)

    if plain:
        return ExpertWeights(draw(intermediate, hidden), draw(hidden, intermediate))
    return ExpertWeights(
        up_proj=draw(intermediate, hidden),
        down_proj=draw(hidden, intermediate),
        gate_proj=draw(intermediate, hidden),
        gate_bias=draw(intermediate),
        up_bias=draw(intermediate),
        down_bias=draw(hidden),
    )


def shuffled_copy(expert: ExpertWeights, order: Tensor) -> ExpertWeights:
    """Puts an expert beside a copy of itself whose neurons are in another order."""
    copies = expert.map(lambda tensor: torch.cat([tensor, tensor]))
    for rows in (copies.up_proj, copies.gate_proj, copies.gate_bias, copies.up_bias):
        if rows is not None:
            rows[1] = rows[1, order]
    copies.down_proj[1] = copies.down_proj[1, :, order]
    return copies


def run(experts: ExpertWeights, member: int, x: Tensor) -> Tensor:
    assert experts.gate_proj is not None
    assert experts.gate_bias is not None
    assert experts.up_bias is not None
    assert experts.down_bias is not None
    gate = silu(experts.gate_proj[member] @ x + experts.gate_bias[member])
    up = experts.up_proj[member] @ x + experts.up_bias[member]
    return experts.down_proj[member] @ (gate * up) + experts.down_bias[member]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("reference", [0, 1])
def test_a_shuffled_copy_aligns_back_exactly(
    plain: bool, dtype: torch.dtype, reference: int
) -> None:
    expert = random_experts(1, plain=plain).map(lambda tensor: tensor.to(dtype))
    pair = shuffled_copy(expert, torch.tensor([3, 0, 4, 1, 2]))
    aligned = align_neurons(pair, reference)

    def check(tensor: Tensor) -> Tensor:
        assert torch.equal(tensor[0], tensor[1])
        return tensor

    aligned.map(check)
    assert torch.equal(aligned.up_proj[reference], pair.up_proj[reference])
    assert aligned.up_proj.dtype == dtype


def test_no_member_computes_anything_else_than_before() -> None:
    experts = random_experts(3)
    aligned = align_neurons(experts, reference=1)
    x = torch.randn(4, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(aligned.up_proj, experts.up_proj)
    for member in range(3):
        torch.testing.assert_close(run(aligned, member, x), run(experts, member, x))


def test_the_matching_is_the_best_of_all_permutations() -> None:
    experts = random_experts(2)
    aligned = align_neurons(experts, reference=0)

    names = ("up_proj", "down_proj", "gate_proj", "gate_bias", "up_bias", "down_bias")

    def agreement(pair: ExpertWeights) -> float:
        parts = [getattr(pair, name) for name in names]
        return float(sum((part[0] * part[1]).sum() for part in parts))

    def reordered(order: Tensor) -> ExpertWeights:
        first, second = experts.select(torch.tensor([0])), experts.select(torch.tensor([1]))
        moved = shuffled_copy(second, order).select(torch.tensor([1]))
        return ExpertWeights(
            **{name: torch.cat([getattr(first, name), getattr(moved, name)]) for name in names}
        )

    best = max(agreement(reordered(torch.tensor(order))) for order in permutations(range(5)))
    assert agreement(aligned) == pytest.approx(best)
