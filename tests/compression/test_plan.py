"""Plans: what they refuse, what follows from them, and the plan that changes nothing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.compression.apply import apply_layer, apply_plan
from lightning_smoe.compression.layer_plan import LayerPlan
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.errors import InputError
from lightning_smoe.functional.alignment import ByActivations, ByWeights
from lightning_smoe.functional.pooling import NeuronPool
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import LogSumExp, MeanRows, RouterRepair, Slice
from lightning_smoe.functional.router_rows import Map
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.mapped import is_mapped
from tests.compression.plans import NAME, Groups, layer_plan, pairs, whole_plan
from tests.families import build


@pytest.fixture(scope="module")
def layers() -> list[MoELayer]:
    """Two layers of 12 experts, of which the router selects two."""
    return find_moe_layers(build("mixtral"))


@pytest.fixture(scope="module")
def grouped() -> MoELayer:
    """A layer whose router chooses between experts 0 to 5 and 6 to 11 first; top_k is 4."""
    return find_moe_layers(build("deepseek_v3"))[0]


def test_a_valid_plan_is_accepted(layers: list[MoELayer], grouped: MoELayer) -> None:
    layer_plan(pairs()).check(layers[0], Slice())
    layer_plan([[7], [2]], [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]).check(layers[0], Slice())
    layer_plan([[0], [5, 1], [2], [4], *pairs(6, 9), [10], [11]], [3]).check(grouped, Slice())
    whole_plan().check(layers, "any model")
    CompressionPlan.identity(layers).check(layers, "any model")


@pytest.mark.parametrize(
    ("groups", "dropped", "message"),
    [
        ([*pairs(), [3]], [], "names expert 3 2 times; name each of 0 to 11 once"),
        (pairs(), [3], "names expert 3 2 times"),
        ([[0, 0, 1], *pairs(2)], [], "names expert 0 2 times"),
        (pairs(2), [0], "names expert 1 0 times; name each of 0 to 11 once, in one group or in"),
        ([*pairs(), [12]], [], "names expert 12 1 times; name each of 0 to 11 once"),
        (pairs(), [-1], "names expert -1 1 times; name each of 0 to 11 once"),
        ([*pairs(), []], [], "has an empty group; remove it"),
        ([list(range(12))], [], "keeps 1 experts but the router selects top_k=2; keep at least 2"),
        ([], range(12), "keeps 0 experts but the router selects top_k=2; keep at least 2"),
    ],
)
def test_plans_that_misplace_an_expert_are_refused(
    groups: Groups, dropped: Sequence[int], message: str, layers: list[MoELayer]
) -> None:
    with pytest.raises(InputError, match=f"{NAME}: the plan {message}"):
        layer_plan(groups, dropped).check(layers[0], Slice())


@pytest.mark.parametrize(
    ("groups", "dropped"),
    [
        ([[0, 6], [1], [2], [3], [4], [7], [8], [9], [10], [11]], [5]),
        ([[0], [1], [2], [3], [4], [6], [7], [8], [9]], [5, 10, 11]),
        ([[0], [1], [2], [3], [4], [6], [7], [8]], [5, 9, 10, 11]),
        ([[0], [1], [2], [6], [7], [8]], [3, 4, 5, 9, 10, 11]),
        ([[6], [7], [8], [9], [0], [1], [2], [3]], [4, 5, 10, 11]),
        ([[0], [6], [1], [7], [2], [8], [3], [9]], [4, 5, 10, 11]),
    ],
    ids=["merged across", "nine slots", "five and three", "three each", "swapped", "in turn"],
)
def test_plans_that_mix_the_blocks_of_a_router_are_refused(
    groups: Groups, dropped: Sequence[int], grouped: MoELayer
) -> None:
    message = "2 equal blocks of experts; keep the same number .at least 4. in each block of 6"
    with pytest.raises(InputError, match=message):
        layer_plan(groups, dropped).check(grouped, Slice())


@pytest.mark.parametrize(
    "groups",
    [
        [[0, 6], [1], [2], [3, 4, 5], [7], [8], [9], [10, 11]],
        [[0, 6], [1, 7, 8, 9, 10, 11], [2, 3, 4, 5]],
        [list(range(12))],
    ],
    ids=["merged across", "fewer than top_k", "one"],
)
def test_a_router_that_keeps_all_rows_binds_neither_blocks_nor_counts(
    groups: Groups, grouped: MoELayer
) -> None:
    layer_plan(groups).check(grouped, Map())
    with pytest.raises(InputError):
        layer_plan(groups).check(grouped, Slice())


def test_a_router_that_keeps_all_rows_has_a_slot_for_each(layers: list[MoELayer]) -> None:
    plan = layer_plan(pairs(2), [0, 1])
    plan.check(layers[0], Slice())
    message = (
        r"drops experts \[0, 1\], but under the router Map every row needs a slot; put them in"
    )
    with pytest.raises(InputError, match=message):
        plan.check(layers[0], Map())
    with pytest.raises(InputError, match=message):
        CompressionPlan((plan,), Map()).check(layers, "")


def test_a_plan_for_another_number_of_experts_is_refused(layers: list[MoELayer]) -> None:
    plan = LayerPlan(NAME, 3, ((0,), (1,), (2,)))
    with pytest.raises(InputError, match="the plan is for 3 experts and the model has 12"):
        plan.check(layers[0], Slice())


@pytest.mark.parametrize(
    "shares", [torch.ones(5), -torch.ones(12), torch.full((12,), torch.nan)], ids=str
)
def test_shares_that_are_no_shares_are_refused(shares: Tensor, layers: list[MoELayer]) -> None:
    plan = replace(layer_plan(pairs()), weights=shares.double())
    with pytest.raises(InputError, match=r"plan\.safetensors must give 12 shares of 0 or more"):
        plan.check(layers[0], Slice())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.layers.7.mlp"], "'model.layers.7.mlp' 1 times; the model's expert layers are"),
        ([NAME, NAME], f"'{NAME}' 2 times; the model's expert layers are {NAME}, model.layers.1"),
    ],
)
def test_layers_that_are_not_there_or_named_twice_are_refused(
    names: list[str], message: str, layers: list[MoELayer]
) -> None:
    plan = CompressionPlan(tuple(layer_plan(pairs(), name=name) for name in names))
    with pytest.raises(InputError, match=f"plan.json names {message}"):
        plan.check(layers, "")


def test_a_plan_for_another_model_is_refused_unless_it_names_none(layers: list[MoELayer]) -> None:
    plan = replace(whole_plan(), model="fingerprint of one")
    plan.check(layers, "fingerprint of one")
    with pytest.raises(InputError, match=r"made for another model; .* or remove its key 'model'"):
        plan.check(layers, "fingerprint of another")
    replace(plan, model="").check(layers, "fingerprint of another")


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan")])
def test_a_refit_without_strength_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=f"strength={strength} must be at least"):
        Refit(strength)


def test_shares_that_are_not_given_are_equal() -> None:
    grouping = layer_plan([[0, 3], [1]], [2, *range(4, 12)]).grouping
    assert grouping.assignment.tolist() == [0, 1, -1, 0] + [-1] * 8
    assert grouping.mixing()[0].tolist() == [0.5, 0, 0, 0.5] + [0] * 8


def test_only_layers_that_change_have_work() -> None:
    same = layer_plan([[e] for e in range(12)])
    turned = layer_plan([[e] for e in reversed(range(12))], name="model.layers.1.mlp")
    assert same.is_identity
    assert not turned.is_identity
    assert list(CompressionPlan((same, turned)).by_name()) == ["model.layers.1.mlp"]


@pytest.mark.parametrize(
    ("change", "reads"),
    [
        ({}, False),
        ({"router": MeanRows()}, False),
        ({"router": LogSumExp()}, True),
        ({"router": Map()}, False),
        ({"merger": NeuronPool()}, False),
        ({"refit": Refit()}, True),
    ],
)
def test_a_plan_reads_tokens_if_router_or_refit_is_fitted(
    change: dict[str, Any], reads: bool
) -> None:
    assert replace(whole_plan(), **change).reads_tokens == reads


@pytest.mark.parametrize(
    ("change", "needs"),
    [
        ({}, False),
        ({"router": LogSumExp(), "refit": Refit()}, False),
        ({"alignment": ByWeights()}, False),
        ({"alignment": ByActivations()}, True),
        ({"merger": NeuronPool()}, True),
    ],
)
def test_a_plan_needs_the_sample_if_merger_or_alignment_looks_at_it(
    change: dict[str, Any], needs: bool
) -> None:
    assert replace(whole_plan(), **change).needs_sample == needs


@torch.no_grad()
@pytest.mark.parametrize("router", [Slice(), Map()], ids=str)
def test_the_identity_plan_keeps_every_logit_exactly(
    tiny_moe: PreTrainedModel, tokens: Tensor, router: RouterRepair
) -> None:
    before = tiny_moe(tokens).logits
    plan = CompressionPlan.identity(find_moe_layers(tiny_moe))
    apply_plan(tiny_moe, replace(plan, router=router))
    assert not is_mapped(tiny_moe)
    torch.testing.assert_close(tiny_moe(tokens).logits, before, rtol=0, atol=0)


@torch.no_grad()
def test_carrying_out_the_identity_keeps_every_tensor_exactly(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_moe.state_dict().items()}
    logits = tiny_moe(tokens).logits
    layers = find_moe_layers(tiny_moe)
    plan = CompressionPlan.identity(layers)
    for layer, same in zip(layers, plan.layers, strict=True):
        apply_layer(layer, same, plan)
    after = tiny_moe.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    torch.testing.assert_close(tiny_moe(tokens).logits, logits, rtol=0, atol=0)
