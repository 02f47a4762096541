"""Groups by the exact routed error, against a loop over tokens and pairs."""

from functools import partial
from itertools import combinations

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.routed_greedy import RoutedGreedy, _Groups, _output_grams
from lightning_smoe.functional.saliency import Frequency, GateMass, Saliency
from tests.functional.layers import evidence_of, random_weights, swiglu
from tests.functional.partitions import greedy, partition

NUM_EXPERTS = 7


def layer(gated: bool = True, biased: bool = False, seed: int = 0) -> Evidence:
    weights = random_weights(NUM_EXPERTS, gated=gated, biased=biased, seed=seed)
    return evidence_of(weights, num_tokens=50, top_k=3, seed=seed + 1)


def routed_error(evidence: Evidence, mass: Tensor, group: list[int]) -> float:
    """Error of one group, summed over tokens (rows)."""
    wanted = mean = gate = torch.zeros((), dtype=torch.float64)
    for expert in group:
        output = evidence.weights.outputs(evidence.sample.states, expert, swiglu)
        own = evidence.gates[:, expert : expert + 1].double()
        wanted = wanted + own * output
        mean = mean + mass[expert] / mass[group].sum() * output
        gate = gate + own
    return float((wanted - gate * mean).square().sum())


def increase(evidence: Evidence, mass: Tensor, a: list[int], b: list[int]) -> float:
    """What joining two groups adds to the error."""
    apart = routed_error(evidence, mass, a) + routed_error(evidence, mass, b)
    return routed_error(evidence, mass, a + b) - apart


@pytest.mark.parametrize("saliency", [GateMass(), Frequency()])
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (True, True), (False, False)])
def test_groups_are_those_of_a_greedy_loop(saliency: Saliency, gated: bool, biased: bool) -> None:
    evidence = layer(gated, biased)
    mass = saliency(evidence)
    for num_groups in (2, 4):
        labels = RoutedGreedy(saliency)(evidence, num_groups).tolist()
        expected = greedy(NUM_EXPERTS, num_groups, partial(increase, evidence, mass))
        assert partition(labels) == expected


def test_every_price_is_the_error_that_joining_adds() -> None:
    evidence = layer()
    mass = GateMass()(evidence)
    groups = _Groups(_output_grams(evidence), evidence.gates.T.contiguous(), mass.float())
    first = groups.first_increases()
    for i, j in combinations(range(NUM_EXPERTS), 2):
        assert float(first[i, j]) == pytest.approx(increase(evidence, mass, [i], [j]), rel=1e-4)
    groups.join(0, 3)
    groups.join(0, 5)
    groups.join(1, 2)
    for group, members in ((0, [0, 3, 5]), (1, [1, 2]), (4, [4])):
        prices = groups.increases(group)
        for other, others in ((0, [0, 3, 5]), (1, [1, 2]), (4, [4]), (6, [6])):
            if other != group:
                expected = increase(evidence, mass, members, others)
                assert float(prices[other]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_order_of_the_experts_does_not_matter() -> None:
    evidence = layer()
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    labels = RoutedGreedy()(evidence, 3)
    shuffled = RoutedGreedy()(evidence.select(order), 3)
    assert partition(shuffled.tolist()) == partition(labels[order].tolist())


def test_equal_experts_join_first() -> None:
    weights = random_weights(NUM_EXPERTS)
    twins = weights.select(torch.tensor([0, 1, 2, 0, 4, 5, 1]))
    labels = RoutedGreedy()(evidence_of(twins, num_tokens=50, top_k=3), 5).tolist()
    assert partition(labels) == partition([0, 1, 2, 0, 4, 5, 1])


def test_experts_that_no_token_visits_join_at_no_cost() -> None:
    evidence = evidence_of(random_weights(NUM_EXPERTS), num_tokens=50, unvisited=3)
    labels = RoutedGreedy()(evidence, NUM_EXPERTS - 1)
    assert labels.bincount().max() == 2
    assert labels.tolist().count(int(labels[3])) == 2


def test_a_thinned_sample_is_spread_evenly() -> None:
    sample = layer().sample
    thin = sample.thinned(5)
    assert torch.equal(thin.states, sample.states[[0, 10, 20, 30, 40]])
    assert torch.equal(thin.gates, sample.gates[[0, 10, 20, 30, 40]])
    assert torch.equal(sample.thinned(50).states, sample.states)


def test_fewer_tokens_are_looked_at_than_the_sample_holds() -> None:
    evidence = layer()
    thin = Evidence(evidence.sums, evidence.sample.thinned(10), evidence.weights, swiglu)
    assert torch.equal(RoutedGreedy(num_tokens=10)(evidence, 3), RoutedGreedy()(thin, 3))


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="num_tokens=0 judges by nothing"):
        RoutedGreedy(num_tokens=0)
