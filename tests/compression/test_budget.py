"""Budgets keep what is asked for and what every router needs, and rank and cluster by the book."""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from lightning_smoe.compression.budget import (
    Bounds,
    Budget,
    GlobalRank,
    GroupGreedy,
    Uniform,
    share_out,
)
from lightning_smoe.compression.measured_budget import LayerErrorDP, LocalSearch, MeasuredDP
from lightning_smoe.compression.planner import experts_to_keep, make_plan
from lightning_smoe.compression.recipe import Recipe
from lightning_smoe.compression.strategy import from_spec, to_spec
from lightning_smoe.errors import InputError
from lightning_smoe.functional.clustering import GateMassWard
from lightning_smoe.functional.router import Slice
from lightning_smoe.functional.router_rows import Map
from lightning_smoe.functional.saliency import GateMass, Reap
from tests.compression.trial_models import FAMILIES, POOL, PRUNE, known, trials_of

BUDGETS = [
    Uniform(),
    GlobalRank(),
    GlobalRank(GateMass(), normalize=False),
    GroupGreedy(),
    LayerErrorDP(grid_size=4),
    MeasuredDP(grid_size=3),
    LocalSearch(GlobalRank(), num_trials=4),
]


def allowed(budget: Budget, family: str, router: Any, keep: float = 0.75) -> Sequence[range]:
    return budget.limits(trials_of(family).layers, keep, router).allowed


@pytest.mark.parametrize("recipe", [PRUNE, POOL], ids=["prune", "pool"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_every_budget_keeps_what_is_asked_for(family: str, recipe: Recipe, budget: Budget) -> None:
    trials = trials_of(family, recipe, keep=10)
    counts = share_out(budget, trials)
    assert list(counts) == [layer.name for layer in trials.layers]
    assert sum(counts.values()) == 20
    plan = make_plan(known(family)[1], trials.layers, recipe, counts)
    plan.check(trials.layers, plan.model)
    assert [len(layer.groups) for layer in plan.layers] == list(counts.values())
    assert share_out(budget, trials_of(family, recipe, keep=10)) == counts


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_keeps_all(family: str, budget: Budget) -> None:
    assert set(share_out(budget, trials_of(family, keep=1.0)).values()) == {12}


def test_uniform_is_the_same_for_each_layer() -> None:
    for family, keep in itertools.product(FAMILIES, (8, 0.85, 1.0)):
        trials = trials_of(family, keep=keep)
        wanted = {x.name: experts_to_keep(keep, x, Slice()) for x in trials.layers}
        assert Uniform()(trials) == wanted


def test_layers_keep_what_their_routers_need() -> None:
    budget = GlobalRank()
    assert set(allowed(budget, "mixtral", Slice())) == {range(2, 13)}
    # Two groups of six, of which one is selected for four experts.
    assert set(allowed(budget, "deepseek_v3", Slice())) == {range(8, 13, 2)}
    for family in FAMILIES:
        assert set(allowed(budget, family, Map())) == {range(1, 13)}


@pytest.mark.parametrize(
    ("bounds", "family", "found"),
    [
        (Bounds(round_to=3), "mixtral", range(3, 13, 3)),
        (Bounds(round_to=5), "mixtral", range(5, 13, 5)),
        (Bounds(round_to=3), "deepseek_v3", range(12, 13, 6)),
        (Bounds(min_keep=0.6), "mixtral", range(8, 13)),
        (Bounds(4, 0.6), "mixtral", range(8, 13, 4)),
        (Bounds(min_keep=0.7), "deepseek_v3", range(10, 13, 2)),
    ],
)
def test_bounds_hold_for_each_layer(bounds: Bounds, family: str, found: range) -> None:
    for numbers in allowed(GlobalRank(bounds=bounds), family, Slice(), 1.0):
        assert list(numbers) == list(found)


@pytest.mark.parametrize(
    ("keep", "round_to", "total"),
    [
        (0.5, 1, 12),
        (0.52, 1, 12),
        (0.55, 1, 13),
        (7, 1, 14),
        (7, 4, 12),
        (0.5, 5, 10),
        (1.0, 5, 20),
    ],
)
def test_the_total_is_exact_or_the_next_below(keep: int | float, round_to: int, total: int) -> None:
    bounds = Bounds(round_to)
    trials = trials_of("mixtral", keep=keep)
    budgets = [
        GlobalRank(bounds=bounds),
        GroupGreedy(bounds=bounds),
        LayerErrorDP(grid_size=3, bounds=bounds),
    ]
    for budget in budgets:
        counts = share_out(budget, trials)
        assert sum(counts.values()) == total
        assert all(count % round_to == 0 for count in counts.values())


@pytest.mark.parametrize(
    ("keep", "bounds", "message"),
    [
        (1, Bounds(), "model.keep=1: layers need 4 experts at least, and 2 are to stay; raise"),
        (0.5, Bounds(min_keep=0.8), "need 20 experts at least, and 12 are to stay"),
        (
            0.5,
            Bounds(round_to=13),
            r"layers.0.mlp has 12 experts and needs 2, .* no multiple of 13",
        ),
        (13, Bounds(), "asks for 13 experts but model.layers.0.mlp has 12"),
        (0.0, Bounds(), "model.keep is 0.0; give a fraction"),
    ],
)
def test_what_layers_cannot_keep_is_refused(keep: float, bounds: Bounds, message: str) -> None:
    layers = trials_of("mixtral").layers
    for budget in (GlobalRank(bounds=bounds), GroupGreedy(bounds=bounds)):
        with pytest.raises(InputError, match=message):
            budget.limits(layers, keep, Slice())


@pytest.mark.parametrize("normalize_scores", [False, True])
def test_the_global_rank_is_a_sort_of_all_experts(normalize_scores: bool) -> None:
    trials = trials_of("mixtral", keep=7)
    ranked = []
    for layer in trials.layers:
        scores = Reap()(trials.evidence(layer))
        scores = scores / scores.mean() if normalize_scores else scores
        ranked += [(float(score), layer.name) for score in scores]
    kept = [name for _, name in sorted(ranked, reverse=True)[:14]]
    wanted = {layer.name: kept.count(layer.name) for layer in trials.layers}
    assert min(wanted.values()) >= 2
    assert share_out(GlobalRank(Reap(), normalize_scores), trials) == wanted


@torch.no_grad()
def test_group_greedy_goes_by_the_spread_within_groups() -> None:
    trials = trials_of("mixtral", keep=7)
    costs = {}
    for layer in trials.layers:
        evidence = trials.evidence(layer)
        means = normalize(evidence.output_sums.plain)
        distance = torch.cdist(means, means)
        for count in range(1, 13):
            labels = GateMassWard()(distance, GateMass()(evidence), count)
            groups = [means[labels == group] for group in range(count)]
            spread = sum(float((y - g.mean(0)).norm()) for g in groups for y in g)
            costs[layer.name, count] = spread
    counts = {layer.name: 12 for layer in trials.layers}
    while sum(counts.values()) > 14:
        counts[min(counts, key=lambda name: costs[name, counts[name] - 1])] -= 1
    assert share_out(GroupGreedy(2, GateMassWard()), trials) == counts
    assert set(share_out(GroupGreedy(1, GateMassWard()), trials).values()) == {7}


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_budgets_can_be_written_and_read(budget: Budget) -> None:
    assert from_spec(to_spec(budget), Budget) == budget  # type: ignore[type-abstract]  # a check


def test_counts_are_told_by_layer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        share_out(Uniform(), trials_of("deepseek_v3", keep=10))
    assert "20 of 24 experts stay, by layer 1: 10, 2: 10" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bounds(round_to=0), "round_to=0 is no step"),
        (lambda: Bounds(min_keep=1.5), "min_keep=1.5 is no fraction"),
        (lambda: GroupGreedy(0), "num_layers=0 makes no group"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
