"""What to say of the tensors of a checkpoint that its model has no place for."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_NAMED = re.compile(r"(^|\.)mtp")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def sayings(
    keys: Iterable[str], unused: Iterable[str], config: Mapping[str, Any], num_layers: int
) -> list[str]:
    """What a person should know of tensors that are not loaded, a sentence each.

    Args:
        keys: Every key of the files; transformers passes over some without a word.
        unused: Those that no place was found for.
        config: The content of config.json.
        num_layers: Decoder layers that the model has.
    """
    # DeepSeek and others count them on behind the decoder layers.
    more = config.get("num_nextn_predict_layers")
    last = num_layers + (more if isinstance(more, int) else 1)
    ahead = sorted(key for key in keys if _predicts_ahead(key, range(num_layers, last)))
    others = sorted({*unused} - {*ahead})
    found = []
    if ahead:
        found.append(
            f"{len(ahead)} tensors of multi-token-prediction layers ({ahead[0]}) are dropped: "
            "transformers has no such layers"
        )
    if others:
        found.append(f"{len(others)} tensors are not used, such as {others[0]}")
    return found


def _predicts_ahead(key: str, layers: range) -> bool:
    number = _LAYER.search(key)
    return _NAMED.search(key) is not None or (number is not None and int(number.group(1)) in layers)
