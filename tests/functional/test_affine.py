"""A matrix and its bias as one map, against the experts' own computation."""

import pytest
import torch

from lightning_smoe.functional.affine import (
    features_of,
    input_map,
    output_map,
    with_input_map,
    with_output_map,
)
from tests.functional.groups import KINDS, group_of, tokens_of
from tests.functional.layers import swiglu
from tests.weights import parts


@pytest.mark.parametrize("kind", KINDS)
def test_the_maps_compute_what_the_experts_do(kind: str) -> None:
    experts, states = group_of(kind), tokens_of().states
    for expert in range(3):
        read = features_of(states, experts.up_bias) @ input_map(experts)[expert].T
        gate, up = (read[:, :5], read[:, 5:]) if experts.gate_proj is not None else (None, read)
        hidden = swiglu(gate, up)
        torch.testing.assert_close(hidden, experts.activations(states, expert, swiglu))
        written = features_of(hidden, experts.down_bias) @ output_map(experts)[expert].T
        torch.testing.assert_close(written, experts.outputs(states, expert, swiglu))


@pytest.mark.parametrize("kind", KINDS)
def test_maps_put_into_other_experts_make_them_the_same(kind: str) -> None:
    experts = group_of(kind)
    others = experts.map(torch.zeros_like)
    others = with_input_map(others, input_map(experts))
    others = with_output_map(others, output_map(experts))
    for ours, theirs in zip(parts(others), parts(experts), strict=True):
        assert torch.equal(ours, theirs)
