"""Strategies as data: a frozen dataclass to and from its class path and settings."""

from dataclasses import asdict
from importlib import import_module
from typing import Any, TypeVar

from lightning_smoe.errors import InputError

T = TypeVar("T")


def to_spec(strategy: Any) -> dict[str, Any] | None:
    """Writes a strategy (a frozen dataclass of plain settings) as a class path and its settings."""
    if strategy is None:
        return None
    kind = type(strategy)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": asdict(strategy)}


def from_spec(spec: dict[str, Any], kind: type[T]) -> T:
    """Builds a strategy from its class path and settings.

    Raises:
        InputError: There is no such class, it is of another kind, or it refuses its settings.
    """
    try:
        module, _, name = spec["class_path"].rpartition(".")
        strategy = getattr(import_module(module), name)(**spec.get("init_args", {}))
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{spec} does not describe a {kind.__name__}: {error}") from error
    if not isinstance(strategy, kind):
        raise InputError(f"{spec['class_path']} is not a {kind.__name__}")
    return strategy
