"""Router rows that share experts, within one layer."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import find_moe_layers
from tests.families import NUM_EXPERTS, build
from tests.models.sharing import KEPT, assignment_of
from tests.weights import parts


def test_the_router_keeps_every_bit_and_the_experts_are_those_given(
    tiny_moe: PreTrainedModel,
) -> None:
    for layer in find_moe_layers(tiny_moe):
        router = [(t.attribute, t.kind, t.rows.clone()) for t in layer.router_tensors]
        weights = layer.weights().select(torch.arange(2, 2 + KEPT))
        block, experts = layer.block, layer.experts
        layer.share(weights, assignment_of(0).int())
        again = next(x for x in find_moe_layers(tiny_moe) if x.name == layer.name)
        assert (again.block, again.experts) == (block, experts)
        assert (again.num_experts, again.num_router_rows) == (KEPT, NUM_EXPERTS)
        for (attribute, kind, rows), tensor in zip(router, again.router_tensors, strict=True):
            assert (tensor.attribute, tensor.kind) == (attribute, kind)
            torch.testing.assert_close(tensor.rows, rows, rtol=0, atol=0)
        assert again.expert_map is not None
        torch.testing.assert_close(again.expert_map, assignment_of(0), rtol=0, atol=0)
        for found, given in zip(parts(again.weights()), parts(weights), strict=True):
            torch.testing.assert_close(found, given, rtol=0, atol=0)


@torch.no_grad()
def test_router_logits_have_a_column_for_each_row(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    layer = find_moe_layers(tiny_moe)[0]
    layer.share(layer.weights().select(torch.arange(KEPT)), assignment_of(0))
    found = []
    with layer.router.register_forward_hook(lambda *call: found.append(call[-1])):
        tiny_moe(tokens)
    assert layer.router_logits(found[0]).shape == (tokens.numel(), NUM_EXPERTS)
    rows = torch.tensor([[0, KEPT], [1, NUM_EXPERTS - 1]])
    assert layer.experts_of(rows).tolist() == [[0, 0], [1, (NUM_EXPERTS - 1) % KEPT]]


def test_without_a_map_rows_are_experts(tiny_moe: PreTrainedModel) -> None:
    layer = find_moe_layers(tiny_moe)[0]
    assert layer.expert_map is None
    assert layer.num_router_rows == layer.num_experts
    rows = torch.arange(NUM_EXPERTS)
    assert layer.experts_of(rows) is rows


@torch.no_grad()
def test_shared_experts_are_shared_by_more_rows(tokens: Tensor) -> None:
    steps, whole = build("qwen2_moe"), build("qwen2_moe")
    last = find_moe_layers(steps)[0]
    last.share(last.weights().select(torch.arange(6)), torch.arange(NUM_EXPERTS) % 6)
    last.share(last.weights().select(torch.arange(3)), torch.arange(NUM_EXPERTS) % 3)
    once = find_moe_layers(whole)[0]
    once.share(once.weights().select(torch.arange(3)), torch.arange(NUM_EXPERTS) % 3)
    torch.testing.assert_close(steps(tokens).logits, whole(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    "assignment",
    [torch.zeros(NUM_EXPERTS - 1).long(), torch.arange(NUM_EXPERTS), -torch.ones(12).long()],
    ids=["a row is left out", "an expert is not there", "counted from the end"],
)
def test_an_assignment_that_does_not_fit_is_refused_and_changes_nothing(assignment: Tensor) -> None:
    layer = find_moe_layers(build("mixtral"))[0]
    weights = layer.weights().select(torch.arange(KEPT))
    with pytest.raises(InputError, match=r"each of 12 router rows to one of 5 experts"):
        layer.share(weights, assignment)
    assert layer.expert_map is None
    assert layer.num_experts == NUM_EXPERTS
