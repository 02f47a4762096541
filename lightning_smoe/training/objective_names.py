"""What objectives are called in logs."""

import re
from collections import Counter
from collections.abc import Sequence

# Where a word begins in the name of a class: `TopKKL` is `top_k_kl`.
_WORD = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[a-zA-Z])(?=KL$|MSE$)")


def logged_name(kind: type) -> str:
    """The name of a class of objectives in logs: its words in small letters."""
    return _WORD.sub("_", kind.__name__).lower()


def distinct_names(names: Sequence[str]) -> list[str]:
    """The names; where one is there several times, each gets its number, counted from one."""
    total, seen = Counter(names), Counter[str]()
    seen.update(dict.fromkeys(names, 0))
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if total[name] == 1 else f"{name}_{seen[name]}")
    return distinct
