"""Which parameters of a model training may change, and at which learning rate."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models.parts import PARTS, parameters_of_parts

# Names at one learning rate, or a learning rate for each name.
Trainable = Sequence[str] | Mapping[str, float]

_NUM_NEAR_NAMES = 4


@dataclass(frozen=True, eq=False)
class TrainedGroup:
    """Parameters that are trained at one learning rate.

    Args:
        name: What the settings call them.
        parameters: By their full names in the model, in its order.
        learning_rate: Peak step size, above 0.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    learning_rate: float

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def check_trainable(trainable: Trainable, is_needed: bool = True) -> None:
    """Checks what can be checked before a model is known.

    Args:
        trainable: What the settings name.
        is_needed: Whether nothing would be trained if it is empty.

    Raises:
        ValueError: It is empty but needed, a name is no regular expression, or a learning rate is
            not above 0.
    """
    if isinstance(trainable, str):
        raise ValueError(f"trainable={trainable} must be a list; write [{trainable}]")
    if not trainable and is_needed:
        raise ValueError(f"trainable is empty; name {', '.join(PARTS[:-1])} or {PARTS[-1]}")
    for name in trainable:
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(
                f"trainable names {name}, which is none of {', '.join(PARTS)} and no regular "
                f"expression either: {error}"
            ) from error
    rates = dict(trainable) if isinstance(trainable, Mapping) else {}
    if not all(rate > 0 for rate in rates.values()):
        raise ValueError(f"trainable={rates}: learning rates must be above 0")


def find_trained(
    model: PreTrainedModel, trainable: Trainable, learning_rate: float
) -> list[TrainedGroup]:
    """Finds what the settings name, without a look at any weight; changes nothing.

    A name is a part of `models/parts.py`, several joined by `+`, or a regular expression that is
    searched in full parameter names. A parameter that is named twice belongs to the first that
    names it, so the narrower name has to stand first.

    Args:
        model: A model, or its outline.
        trainable: What is trained.
        learning_rate: Step size of names that have none of their own.

    Raises:
        InputError: A name finds nothing, or only what names before it have.
    """
    parts = parameters_of_parts(model)
    groups: list[TrainedGroup] = []
    taken: set[str] = set()
    for name in trainable:
        found = _named(parts, name)
        left = {key: p for key, p in found.items() if key not in taken}
        if not left:
            raise InputError(
                f"model.recovery.trainable names {name} after others that hold all of it; "
                "put it first, or leave it out"
            )
        taken |= left.keys()
        rate = trainable[name] if isinstance(trainable, Mapping) else learning_rate
        groups.append(TrainedGroup(name, left, rate))
    return groups


def _named(parts: Mapping[Any, dict[str, nn.Parameter]], name: str) -> dict[str, nn.Parameter]:
    pieces = name.split("+")
    if not all(piece in parts for piece in pieces):
        found = {key: p for key, p in parts["all"].items() if re.search(name, key)}
        if not found:
            near = _near_names(parts["all"], name)
            raise InputError(
                f"model.recovery.trainable names {name}, which is none of {', '.join(PARTS)} and "
                f"matches no parameter; near it are {', '.join(near) or 'none'}"
            )
        return found
    for piece in pieces:
        if not parts[piece]:
            raise InputError(
                f"model.recovery.trainable names {piece}, which the model does not have"
            )
    chosen = {key for piece in pieces for key in parts[piece]}
    return {key: p for key, p in parts["all"].items() if key in chosen}


def _near_names(names: Iterable[str], wanted: str) -> list[str]:
    """Parts and ends of parameter names (`gate.weight`) that are spelled nearly so."""
    known: dict[str, None] = dict.fromkeys(PARTS)
    for name in names:
        words = name.split(".")
        known.update(dict.fromkeys(".".join(words[start:]) for start in range(len(words))))
    return get_close_matches(wanted, known, n=_NUM_NEAR_NAMES)


def hold_trainable(model: PreTrainedModel, groups: Sequence[TrainedGroup]) -> None:
    """Lets only these groups of a model change, and holds them in float32.

    In bfloat16 most of Adam's steps would be rounded away; the other parts keep their type.
    """
    model.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
