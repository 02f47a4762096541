"""Random damage to a value that JSON or YAML can hold."""

import copy
import random
from collections.abc import Iterator
from typing import Any

JUNK: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**31,
    10**30,
    -(10**30),
    0.5,
    float("nan"),
    float("inf"),
    1e308,
    "",
    "junk",
    "5",
    [],
    [1],
    ["a"],
    [[1, [2]]],
    {},
    {"a": {"b": [None]}},
    {"": ""},
)


def mutations(value: Any, seed: int, count: int) -> Iterator[Any]:
    """Gives damaged copies of a value: keys dropped, renamed, swapped, or with junk behind them."""
    chance = random.Random(seed)
    for _ in range(count):
        damaged = copy.deepcopy(value)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            _damage(damaged, chance)
        yield damaged


def _damage(value: Any, chance: random.Random) -> None:
    places = list(_places(value))
    if not places:
        return
    *parents, last = chance.choice(places)
    inside = _at(value, parents)
    how = chance.randrange(5)
    if how == 0:
        del inside[last]
    elif how == 1 and isinstance(inside, dict):
        inside[f"{last}{chance.choice('s_X')}"] = inside.pop(last)
    elif how == 2:
        inside[last] = copy.deepcopy(_at(value, chance.choice(places)))
    else:
        inside[last] = copy.deepcopy(chance.choice(JUNK))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything within a value."""
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield (*path, key)
            yield from _places(value[key], (*path, key))


def _at(value: Any, path: Any) -> Any:
    for key in path:
        value = value[key]
    return value
