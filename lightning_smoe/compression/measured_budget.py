"""Budgets by what layers, or the model, would lose: measured, not guessed from saliencies."""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lightning_smoe.compression.budget import Bounds, Budget, Uniform, named
from lightning_smoe.compression.trials import Trials
from lightning_smoe.errors import InputError
from lightning_smoe.functional.allocation import (
    Counts,
    Limits,
    cheapest_counts,
    even_counts,
    falling_curve,
    moves,
    spread_grid,
)
from lightning_smoe.functional.router import RouterRepair
from lightning_smoe.models.layer import MoELayer

logger = logging.getLogger(__name__)

LayerCosts = Callable[[MoELayer, Sequence[int]], Sequence[float]]


@dataclass(frozen=True)
class LayerErrorDP(Budget):
    """Least sum of the layers' errors, by exact dynamic programming.

    D_l(k) is `||y_k - y||^2 / ||y||^2` of the routed experts' output on the sampled tokens, where
    the recipe leaves layer l with k experts, without the refit (see `Trials.layer_errors`). It
    counts every layer's error alike, though the model may mind one more than another: a proxy, that
    may do worse than uniform.

    Args:
        relative: Divide by the energy of the layer's output, and not by the number of tokens. All
            layers add to one stream, in which later layers are often louder.
        grid_size: Numbers of experts that are tried in each layer, at least 2; a monotone curve
            gives the others.
        bounds: Numbers that a layer may keep.
    """

    relative: bool = True
    grid_size: int = 12
    bounds: Bounds = Bounds()

    def __post_init__(self) -> None:
        _check_grid(self.grid_size)

    def __call__(self, trials: Trials) -> dict[str, int]:
        limits = self.limits(trials.layers, trials.keep, trials.recipe.execution.router)
        costs = partial(trials.layer_errors, relative=self.relative)
        return _cheapest(trials, limits, costs, self.grid_size)

    def limits(self, layers: Sequence[MoELayer], keep: int | float, router: RouterRepair) -> Limits:
        return self.bounds.limits(layers, keep, router)


@dataclass(frozen=True)
class MeasuredDP(Budget):
    """Least sum of what each layer alone costs the model, by exact dynamic programming.

    D_l(k) is KL(original || model) in nats a token, where the recipe leaves layer l with k experts,
    without the refit, and the other layers whole. Small errors of different layers nearly add up
    (https://arxiv.org/abs/2308.10438). It takes layers times `grid_size` passes over `num_tokens`
    tokens of calibration text: the same that the statistics are from, never other text.

    Args:
        grid_size: Numbers of experts that are tried in each layer, at least 2; a monotone curve
            gives the others.
        num_tokens: Calibration tokens that the model runs on; their logits stay in memory.
        bounds: Numbers that a layer may keep.
    """

    grid_size: int = 8
    num_tokens: int = 8192
    bounds: Bounds = Bounds()

    def __post_init__(self) -> None:
        _check_grid(self.grid_size)
        _check_num_tokens(self.num_tokens)

    def __call__(self, trials: Trials) -> dict[str, int]:
        limits = self.limits(trials.layers, trials.keep, trials.recipe.execution.router)
        if limits.leave_no_choice:
            return _only(trials, limits)
        measure = trials.measure(self.num_tokens)

        def costs(layer: MoELayer, counts: Sequence[int]) -> list[float]:
            return [measure({layer.name: count}) for count in counts]

        return _cheapest(trials, limits, costs, self.grid_size)

    def limits(self, layers: Sequence[MoELayer], keep: int | float, router: RouterRepair) -> Limits:
        return self.bounds.limits(layers, keep, router)


@dataclass(frozen=True)
class LocalSearch(Budget):
    """Moves experts between two layers wherever the measured KL falls, from a given start.

    Each trial measures KL(original || model) with all layers compressed, without the refit, on
    calibration text, and is taken only if it is clearly lower. It ends when no move helps or the
    trials are used up. The result is never worse than the start on those tokens; on others it may
    be, by their noise.

    Args:
        start: Where it starts.
        num_trials: Allocations measured at most, at least 1.
        num_moved: Experts moved at a time, at least 1; the next number that suits both layers.
        min_gain: Fraction of the KL by which a move must lower it, in [0, 1): without, a search
            near its end follows the noise of its tokens.
        num_tokens: Calibration tokens that the model runs on; their logits stay in memory.
        seed: Seed of the order of moves.
        bounds: Numbers that a layer may keep.
    """

    start: Budget = Uniform()
    num_trials: int = 48
    num_moved: int = 1
    min_gain: float = 0.01
    num_tokens: int = 8192
    seed: int = 0
    bounds: Bounds = Bounds()

    def __post_init__(self) -> None:
        _check_num_tokens(self.num_tokens)
        if self.num_trials < 1 or self.num_moved < 1:
            raise ValueError(
                f"num_trials={self.num_trials} and num_moved={self.num_moved} search nothing; "
                "take 1 or more of each"
            )
        if not 0 <= self.min_gain < 1:
            raise ValueError(f"min_gain={self.min_gain} is no gain; take 0 or more, below 1")

    def __call__(self, trials: Trials) -> dict[str, int]:
        limits = self.limits(trials.layers, trials.keep, trials.recipe.execution.router)
        started = self.start(trials)
        counts = tuple(started[layer.name] for layer in trials.layers)
        for layer, count, numbers in zip(trials.layers, counts, limits.allowed, strict=True):
            if count not in numbers:
                raise InputError(
                    f"model.budget: the start keeps {count} experts in {layer.name}, where the "
                    f"bounds allow {numbers[0]} to {numbers[-1]} in steps of {numbers.step}; give "
                    "the start the same bounds"
                )
        if limits.leave_no_choice:
            return started
        return named(trials.layers, self._search(trials, counts, limits))

    def _search(self, trials: Trials, counts: Counts, limits: Limits) -> Counts:
        measure, draw = trials.measure(self.num_tokens), random.Random(self.seed)
        first = best = measure(named(trials.layers, counts))
        tried, open_moves = {counts}, moves(counts, limits, self.num_moved)
        draw.shuffle(open_moves)
        done = 0
        while open_moves and done < self.num_trials:
            proposed = open_moves.pop()
            if proposed in tried:
                continue
            tried.add(proposed)
            done += 1
            found = measure(named(trials.layers, proposed))
            if found < (1 - self.min_gain) * best:
                counts, best = proposed, found
                open_moves = moves(counts, limits, self.num_moved)
                draw.shuffle(open_moves)
        logger.info("budget: %d moves tried, KL %.4f -> %.4f", done, first, best)
        return counts

    def limits(self, layers: Sequence[MoELayer], keep: int | float, router: RouterRepair) -> Limits:
        started = self.start.limits(layers, keep, router)
        return Limits(self.bounds.limits(layers, keep, router).allowed, started.total)


def _cheapest(trials: Trials, limits: Limits, costs: LayerCosts, grid_size: int) -> dict[str, int]:
    """The allocation of least total cost, by costs that are measured on a grid."""
    if limits.leave_no_choice:
        return _only(trials, limits)
    curves = []
    for layer, numbers in zip(trials.layers, limits.allowed, strict=True):
        grid = spread_grid(numbers, grid_size)
        measured = costs(layer, grid)
        curves.append(falling_curve(grid, measured, numbers))
        shown = ", ".join(f"{k}: {c:.4f}" for k, c in zip(grid, measured, strict=True))
        logger.info("budget: %s would cost %s", layer.name, shown)
    return named(trials.layers, cheapest_counts(curves, limits))


def _only(trials: Trials, limits: Limits) -> dict[str, int]:
    return named(trials.layers, even_counts([x.num_experts for x in trials.layers], limits))


def _check_grid(grid_size: int) -> None:
    if grid_size < 2:
        raise ValueError(f"grid_size={grid_size} makes no curve; take 2 or more")


def _check_num_tokens(num_tokens: int) -> None:
    if num_tokens < 2:
        raise ValueError(f"num_tokens={num_tokens} is too few to predict one from another")
