"""Measured budgets against every allocation there is."""

import itertools
from typing import Any

import pytest

from lightning_smoe.compression.budget import Bounds, share_out
from lightning_smoe.compression.measured_budget import LayerErrorDP, LocalSearch, MeasuredDP
from lightning_smoe.compression.trials import Trials
from lightning_smoe.errors import InputError
from lightning_smoe.functional.allocation import falling_curve
from tests.compression.trial_models import trials_of

# All counts are measured, so that nothing is interpolated.
WHOLE_GRID = 12
NUMBERS = [("mixtral", range(2, 13)), ("deepseek_v3", range(8, 13, 2))]


def best_of_all(trials: Trials, costs: list[dict[int, float]], total: int) -> float:
    return min(
        sum(cost[count] for cost, count in zip(costs, counts, strict=True))
        for counts in itertools.product(*costs)
        if sum(counts) == total
    )


def curve(numbers: range, costs: list[float]) -> dict[int, float]:
    fitted = falling_curve(list(numbers), costs, numbers).tolist()
    return dict(zip(numbers, fitted, strict=True))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(("family", "numbers"), NUMBERS)
def test_the_least_sum_of_layer_errors_is_found(
    family: str, numbers: range, relative: bool
) -> None:
    trials = trials_of(family, keep=10)
    costs = [
        curve(numbers, trials.layer_errors(layer, numbers, relative=relative))
        for layer in trials.layers
    ]
    counts = share_out(LayerErrorDP(relative, WHOLE_GRID), trials)
    found = sum(cost[count] for cost, count in zip(costs, counts.values(), strict=True))
    assert found == pytest.approx(best_of_all(trials, costs, 20))


@pytest.mark.parametrize(("family", "numbers"), NUMBERS)
def test_the_least_sum_of_measured_costs_is_found(family: str, numbers: range) -> None:
    trials = trials_of(family, keep=10)
    measure = trials.measure(10_000)
    costs = [curve(numbers, [measure({x.name: k}) for k in numbers]) for x in trials.layers]
    counts = share_out(MeasuredDP(WHOLE_GRID), trials)
    found = sum(cost[count] for cost, count in zip(costs, counts.values(), strict=True))
    assert found == pytest.approx(best_of_all(trials, costs, 20))


def test_a_search_ends_where_no_move_helps() -> None:
    trials = trials_of("mixtral", keep=8)
    names = [layer.name for layer in trials.layers]
    counts = share_out(LocalSearch(num_trials=100, num_moved=2, min_gain=0.0), trials)
    measure = trials.measure(10_000)
    here = measure(counts)
    assert here <= measure(dict.fromkeys(names, 8))
    for moved in (2, -2):
        near = {names[0]: counts[names[0]] + moved, names[1]: counts[names[1]] - moved}
        if all(2 <= count <= 12 for count in near.values()):
            assert measure(near) >= here


def test_a_search_stays_where_moves_gain_too_little() -> None:
    trials = trials_of("mixtral", keep=8)
    assert set(share_out(LocalSearch(min_gain=0.99), trials).values()) == {8}


def test_a_search_is_bounded_and_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = trials_of("mixtral", keep=8)
    seen: list[dict[str, int]] = []
    plain = Trials.measure

    def counting(self: Trials, num_tokens: int) -> Any:
        measure = plain(self, num_tokens)

        def note(counts: dict[str, int]) -> float:
            seen.append(counts)
            return measure(counts)

        return note

    monkeypatch.setattr(Trials, "measure", counting)
    budget = LocalSearch(num_trials=3)
    first = share_out(budget, trials)
    # The start, and at most three trials, none of them twice.
    assert 2 <= len(seen) <= 4
    assert len({tuple(counts.values()) for counts in seen}) == len(seen)
    again = list(seen)
    assert share_out(budget, trials) == first
    assert seen[len(again) :] == again


def test_no_model_runs_where_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a model ran")

    monkeypatch.setattr(Trials, "measure", fail)
    monkeypatch.setattr(Trials, "layer_errors", fail)
    for budget in (MeasuredDP(), LayerErrorDP(), LocalSearch(MeasuredDP())):
        assert set(share_out(budget, trials_of("mixtral", keep=1.0)).values()) == {12}
        assert set(share_out(budget, trials_of("deepseek_v3", keep=8)).values()) == {8}


def test_a_start_outside_the_bounds_is_refused() -> None:
    budget = LocalSearch(bounds=Bounds(round_to=4))
    with pytest.raises(
        InputError, match=r"start keeps 9 experts in .* allow 4 to 12 in steps of 4"
    ):
        share_out(budget, trials_of("mixtral", keep=9))
    within = LocalSearch(MeasuredDP(bounds=Bounds(4)), bounds=Bounds(4), num_trials=2)
    counts = share_out(within, trials_of("mixtral", keep=9))
    assert sorted(counts.values()) in ([4, 12], [8, 8])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerErrorDP(grid_size=1), "grid_size=1 makes no curve"),
        (lambda: MeasuredDP(1), "grid_size=1 makes no curve"),
        (lambda: MeasuredDP(num_tokens=1), "num_tokens=1 is too few"),
        (lambda: LocalSearch(num_trials=0), "num_trials=0 .* search nothing"),
        (lambda: LocalSearch(num_moved=0), "num_moved=0 search nothing"),
        (lambda: LocalSearch(min_gain=1.0), "min_gain=1.0 is no gain"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
