"""How many experts each layer keeps of those that all layers may keep together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

Counts = tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """Numbers of experts that layers may keep.

    Args:
        allowed: The numbers that each layer may keep, rising.
        total: Experts of all layers together.
    """

    allowed: tuple[range, ...]
    total: int

    @staticmethod
    def within(allowed: Sequence[range], at_most: int) -> "Limits":
        """Limits whose total can be had exactly: the largest that does not exceed a budget.

        Args:
            allowed: The numbers that each layer may keep, rising, none empty.
            at_most: The budget.

        Raises:
            ValueError: All layers together keep more, even at their least.
        """
        least = sum(numbers[0] for numbers in allowed)
        if least > at_most:
            raise ValueError(f"layers need {least} experts at least, and {at_most} are to stay")
        # Bit b says whether the layers so far can keep b experts together.
        reachable = 1
        for numbers in allowed:
            shifted = 0
            for number in numbers:
                shifted |= reachable << number
            reachable = shifted
        affordable = reachable & ((1 << (at_most + 1)) - 1)
        return Limits(tuple(allowed), affordable.bit_length() - 1)

    @property
    def leave_no_choice(self) -> bool:
        """Whether only one allocation is possible."""
        if all(len(numbers) == 1 for numbers in self.allowed):
            return True
        return self.total in {sum(numbers[end] for numbers in self.allowed) for end in (0, -1)}


def cheapest_counts(costs: Sequence[Float64[Tensor, "..."]], limits: Limits) -> Counts:
    """The allocation of least total cost, by dynamic programming.

    `V_l(b) = min_k V_{l-1}(b - k) + D_l(k)`: exact for any costs, in O(layers * total * choices).
    Of equally cheap allocations the later layers keep fewer.

    Args:
        costs: D_l(k) of each layer, for the numbers that it may keep.
        limits: Those numbers, and how many experts all layers keep together.
    """
    best = torch.full((limits.total + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    taken = []
    for numbers, cost in zip(limits.allowed, costs, strict=True):
        found = torch.full_like(best, torch.inf)
        number_taken = torch.full(best.shape, numbers[0], dtype=torch.int64)
        for number, price in zip(numbers, cost.tolist(), strict=True):
            if number > limits.total:
                break
            offered = best[: len(best) - number] + price
            better = offered < found[number:]
            found[number:][better] = offered[better]
            number_taken[number:][better] = number
        best = found
        taken.append(number_taken)
    left, counts = limits.total, []
    for number_taken in reversed(taken):
        counts.append(int(number_taken[left]))
        left -= counts[-1]
    return tuple(reversed(counts))


def even_counts(sizes: Sequence[int], limits: Limits) -> Counts:
    """The allocation nearest to equal fractions of all layers, in the sum of squares.

    Args:
        sizes: Experts that each layer has.
        limits: What the layers may keep.
    """
    share = limits.total / sum(sizes)
    costs = [
        (torch.tensor(list(numbers), dtype=torch.float64) - share * size).square()
        for numbers, size in zip(limits.allowed, sizes, strict=True)
    ]
    return cheapest_counts(costs, limits)


def dropped_saliency(
    scores: Float64[Tensor, " experts"], numbers: Sequence[int], num_blocks: int = 1
) -> Float64[Tensor, " choices"]:
    """Saliency that goes with the experts dropped, if so many of the highest stay.

    Args:
        scores: Saliency of each expert.
        numbers: Experts that stay.
        num_blocks: Contiguous blocks of equal size, of which each keeps equally many.
    """
    ranked = scores.view(num_blocks, -1).sort(dim=1).values
    # From the lowest up, so that small scores are not lost beside large ones.
    lost = torch.nn.functional.pad(ranked.cumsum(1), (1, 0)).sum(0)
    return torch.stack([lost[ranked.shape[1] - number // num_blocks] for number in numbers])


def greedy_counts(costs: Sequence[Float64[Tensor, "..."]], limits: Limits) -> Counts:
    """Takes experts from the layer whose cost after it would be the lowest, one after the other.

    Costs as such are compared, and not what they rise by, so the layers end at about the same cost;
    `cheapest_counts` finds the least total.

    Args:
        costs: Cost of each layer, for the numbers that it may keep.
        limits: Those numbers, and how many experts all layers keep together; where layers keep
            multiples of different numbers, a few less may stay.
    """
    place = [len(numbers) - 1 for numbers in limits.allowed]

    def kept() -> Counts:
        return tuple(n[p] for n, p in zip(limits.allowed, place, strict=True))

    while sum(kept()) > limits.total:
        lowest = [p for p in range(len(place)) if place[p] > 0]
        place[min(lowest, key=lambda layer: float(costs[layer][place[layer] - 1]))] -= 1
    return kept()


def falling_curve(
    known: Sequence[int], costs: Sequence[float], numbers: Sequence[int]
) -> Float64[Tensor, " choices"]:
    """Costs of more numbers of experts than were measured; they never rise with the number.

    Isotonic regression takes out what rises, and monotone cubic interpolation (PCHIP) fills in.

    Args:
        known: Numbers that were measured, rising.
        costs: What they cost.
        numbers: Numbers that are wanted, none outside those that were measured.
    """
    # Imported where they are used: a second of every start.
    from scipy.interpolate import PchipInterpolator
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(increasing=False).fit_transform(known, costs)
    if len(known) == 1:
        return torch.full((len(numbers),), float(fitted[0]), dtype=torch.float64)
    return torch.from_numpy(PchipInterpolator(known, fitted)(list(numbers))).double()


def spread_grid(numbers: Sequence[int], size: int) -> list[int]:
    """Picks so many of rising numbers, evenly spread, the first and the last among them."""
    if size >= len(numbers):
        return list(numbers)
    places = (i * (len(numbers) - 1) / (size - 1) for i in range(size))
    return [numbers[round(place)] for place in places]


def moves(counts: Counts, limits: Limits, num_experts: int) -> list[Counts]:
    """All allocations that differ by experts moved from one layer to another.

    Args:
        counts: Where to start.
        limits: What the layers may keep; the total is that of `counts`.
        num_experts: Experts moved at least; the next number that suits both layers is taken.
    """
    found = []
    for giver, taker in ((g, t) for g in range(len(counts)) for t in range(len(counts)) if g != t):
        step = math.lcm(limits.allowed[giver].step, limits.allowed[taker].step)
        moved = -(-num_experts // step) * step
        changed = list(counts)
        changed[giver] -= moved
        changed[taker] += moved
        if all(changed[layer] in limits.allowed[layer] for layer in (giver, taker)):
            found.append(tuple(changed))
    return found
