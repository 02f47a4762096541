"""The rule of a router, found out from what it did, on models of every family."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.calibration.observer import Batch, RoutedTokens, observing
from lightning_smoe.errors import InputError
from lightning_smoe.functional.evidence import TokenSample
from lightning_smoe.functional.routing import RoutingRule, Score, infer_routing_rule
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from tests.families import FAMILIES, NUM_EXPERTS, build

RULES = {
    "qwen2_moe": RoutingRule("softmax", False),
    "qwen3_moe": RoutingRule("softmax", True),
    "mixtral": RoutingRule("softmax", True),
    "olmoe": RoutingRule("softmax", False),
    "deepseek_v2": RoutingRule("softmax", False),
    "deepseek_v3": RoutingRule("sigmoid", True, 2.5),
    "glm4_moe": RoutingRule("sigmoid", True),
    "gpt_oss": RoutingRule("softmax", True),
    "granitemoe": RoutingRule("softmax", True),
    "ernie4_5_moe": RoutingRule("softmax", True),
    "minimax_m2": RoutingRule("sigmoid", True),
}
# Their routers add a bias, or choose groups first, where experts are selected.
BIASED = ("deepseek_v3", "glm4_moe", "ernie4_5_moe", "minimax_m2")
KEPT = torch.tensor([0, 2, 3, 5, 6, 7, 9, 11])


@torch.no_grad()
def first_layer(model: PreTrainedModel, tokens: Tensor) -> TokenSample:
    """What the first router of a model did; its inputs do not depend on any expert."""
    found: list[TokenSample] = []
    layer = find_moe_layers(model)[0]
    batch = Batch(torch.ones(tokens.numel()).bool(), torch.zeros(tokens.numel()).long())

    def note(_: MoELayer, routed: RoutedTokens) -> None:
        logits, weights = routed.router_logits.float(), routed.routing_weights.float()
        found.append(TokenSample(routed.states, logits, weights, routed.expert_indices))

    with observing([layer], lambda: batch, note):
        model(tokens)
    return found[0]


def is_kept() -> Tensor:
    return torch.zeros(NUM_EXPERTS).bool().index_fill(0, KEPT, True)


@pytest.fixture(scope="module")
def many_tokens() -> Tensor:
    """Enough tokens for every expert to be visited."""
    return torch.randint(2, 256, (8, 16), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("family", RULES)
@pytest.mark.parametrize("halved", [False, True])
def test_the_rule_of_each_family_is_found(family: str, halved: bool, many_tokens: Tensor) -> None:
    model = build(family)
    if halved:
        model.bfloat16()
    rule = infer_routing_rule(first_layer(model, many_tokens))
    expected = RULES[family]
    assert rule == replace(expected, scale=rule.scale)
    assert rule.scale == pytest.approx(expected.scale, rel=4e-3)


@pytest.mark.parametrize("family", RULES)
def test_with_all_experts_the_gates_are_what_the_router_did(
    family: str, many_tokens: Tensor
) -> None:
    sample = first_layer(build(family), many_tokens)
    rule = infer_routing_rule(sample)
    gates = rule.gates_without(sample, torch.ones(NUM_EXPERTS).bool())
    torch.testing.assert_close(gates, sample.gates.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", [family for family in RULES if family not in BIASED])
def test_gates_without_experts_are_those_of_the_pruned_model(
    family: str, many_tokens: Tensor
) -> None:
    model = build(family)
    before = first_layer(model, many_tokens)
    gates = infer_routing_rule(before).gates_without(before, is_kept())
    find_moe_layers(model)[0].select(KEPT)
    after = first_layer(model, many_tokens)
    torch.testing.assert_close(gates[:, KEPT], after.gates.double(), rtol=1e-4, atol=1e-6)
    assert not gates[:, ~is_kept()].any()


@pytest.mark.parametrize("family", BIASED)
def test_where_a_bias_selects_only_the_selection_is_a_guess(
    family: str, many_tokens: Tensor
) -> None:
    model = build(family)
    before = first_layer(model, many_tokens)
    gates = infer_routing_rule(before).gates_without(before, is_kept())[:, KEPT]
    find_moe_layers(model)[0].select(KEPT)
    after = first_layer(model, many_tokens).gates.double()
    stays = before.gates[:, KEPT] > 0
    # DeepSeek-V3 may choose other groups when experts of one are gone; the softmax of ERNIE grows
    # over fewer experts, and its bias does not.
    if family not in {"deepseek_v3", "ernie4_5_moe"}:
        assert bool((after[stays] > 0).all())
    agree = ((gates > 0) == (after > 0)).all(1)
    assert bool(agree.any())
    assert not bool(agree.all())
    torch.testing.assert_close(gates[agree], after[agree], rtol=1e-4, atol=1e-6)


def test_every_family_but_phimoe_has_a_known_rule(many_tokens: Tensor) -> None:
    assert set(FAMILIES) <= set(RULES)
    with pytest.raises(InputError, match=r"follow no known rule.*choose another saliency"):
        infer_routing_rule(first_layer(build("phimoe"), many_tokens))


def sample_under(rule: RoutingRule, num_tokens: int = 30, top_k: int = 3) -> TokenSample:
    """Random tokens that are routed by the rule."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(num_tokens, 8, generator=generator, dtype=torch.float64)
    indices = logits.topk(top_k).indices
    states = torch.randn(num_tokens, 4, generator=generator, dtype=torch.float64)
    return TokenSample(states, logits, rule.weights(logits, indices), indices)


SCORES: tuple[Score, ...] = ("softmax", "sigmoid")
ALL_RULES = [RoutingRule(*options) for options in product(SCORES, (True, False), (1.0, 2.446, 0.3))]


@pytest.mark.parametrize("rule", ALL_RULES, ids=str)
def test_a_rule_is_found_from_its_own_weights(rule: RoutingRule) -> None:
    found = infer_routing_rule(sample_under(rule))
    assert found == replace(rule, scale=found.scale)
    assert found.scale == pytest.approx(rule.scale)


@pytest.mark.parametrize("rule", ALL_RULES, ids=str)
def test_gates_follow_the_loop_over_tokens(rule: RoutingRule) -> None:
    sample = sample_under(rule)
    kept = [0, 1, 3, 4, 6]
    gates = rule.gates_without(
        sample, torch.zeros(8).bool().index_fill(0, torch.tensor(kept), True)
    )
    for token, logits in enumerate(sample.router_logits.tolist()):
        best = sorted(kept, key=lambda expert: -logits[expert])[:3]
        scores = torch.tensor([logits[expert] for expert in kept], dtype=torch.float64)
        scores = scores.softmax(0) if rule.score == "softmax" else scores.sigmoid()
        weights = {expert: float(scores[kept.index(expert)]) for expert in best}
        total = sum(weights.values()) if rule.normalize_weights else 1.0
        expected = [rule.scale * weights.get(expert, 0.0) / total for expert in range(8)]
        torch.testing.assert_close(gates[token], torch.tensor(expected, dtype=torch.float64))


def test_with_fewer_experts_than_the_router_selects_all_are_selected() -> None:
    rule = RoutingRule()
    kept = torch.tensor([True, False, True, False, False, False, False, False])
    gates = rule.gates_without(sample_under(rule), kept)
    assert bool(gates[:, kept].all())
    torch.testing.assert_close(gates.sum(1), torch.ones(30, dtype=torch.float64))


@pytest.mark.parametrize("score", SCORES)
def test_an_expert_that_is_selected_against_its_logit_stays_selected(score: Score) -> None:
    rule = RoutingRule(score)
    sample = sample_under(rule)
    worst = sample.router_logits.topk(3, largest=False).indices
    forced = replace(
        sample, expert_indices=worst, routing_weights=rule.weights(sample.router_logits, worst)
    )
    gates = rule.gates_without(forced, torch.ones(8).bool())
    torch.testing.assert_close(gates, forced.gates.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weight", [0.0, torch.nan])
def test_weights_without_any_rule_are_refused(weight: float) -> None:
    sample = sample_under(RoutingRule())
    broken = replace(sample, routing_weights=torch.full_like(sample.routing_weights, weight))
    with pytest.raises(InputError, match="follow no known rule"):
        infer_routing_rule(broken)


def test_no_tokens_tell_no_rule() -> None:
    with pytest.raises(InputError, match="over 0 tokens"):
        infer_routing_rule(sample_under(RoutingRule(), num_tokens=0))
