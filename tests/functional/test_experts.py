"""Experts in one layout: changing all of their tensors alike."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.experts import ExpertWeights

NAMES = [f.name for f in fields(ExpertWeights)]
WIDTHS = {
    "up_proj": (5, 6),
    "down_proj": (6, 5),
    "gate_proj": (5, 6),
    "gate_bias": (5,),
    "up_bias": (5,),
    "down_bias": (6,),
}
PLAIN = ("up_proj", "down_proj")


def random_experts(num_experts: int = 4, present: tuple[str, ...] = tuple(NAMES)) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)
    drawn = {n: torch.randn(num_experts, *WIDTHS[n], generator=generator) for n in present}
    return ExpertWeights(**drawn)


def test_a_change_reaches_every_tensor_that_is_there() -> None:
    experts = random_experts()
    doubled = experts.map(lambda tensor: 2 * tensor)
    for name in NAMES:
        assert torch.equal(getattr(doubled, name), 2 * getattr(experts, name))


@pytest.mark.parametrize("present", [PLAIN, (*PLAIN, "gate_proj")])
def test_tensors_that_are_absent_stay_absent(present: tuple[str, ...]) -> None:
    experts = random_experts(present=present)
    for changed in (
        experts.map(torch.clone),
        experts.select(torch.tensor([0])),
        experts.with_down(experts.down_proj),
        ExpertWeights.stack([experts, experts]),
    ):
        assert [name for name in NAMES if getattr(changed, name) is not None] == [
            name for name in NAMES if name in present
        ]


def test_selecting_takes_the_named_experts_in_that_order() -> None:
    experts = random_experts()
    chosen = experts.select(torch.tensor([3, 0, 3]))
    for name in NAMES:
        for place, expert in enumerate([3, 0, 3]):
            assert torch.equal(getattr(chosen, name)[place], getattr(experts, name)[expert])


def test_stacking_what_was_selected_one_by_one_gives_the_experts_back() -> None:
    experts = random_experts()
    one_by_one = [experts.select(torch.tensor([expert])) for expert in range(4)]
    stacked = ExpertWeights.stack(one_by_one)
    for name in NAMES:
        assert torch.equal(getattr(stacked, name), getattr(experts, name))


def test_other_output_matrices_leave_the_rest_alone() -> None:
    experts = random_experts()
    down = torch.zeros_like(experts.down_proj)
    changed = experts.with_down(down)
    assert changed.down_proj is down
    same: list[Tensor] = [getattr(changed, name) for name in NAMES if name != "down_proj"]
    assert all(t is getattr(experts, n) for t, n in zip(same, [NAMES[0], *NAMES[2:]], strict=True))
