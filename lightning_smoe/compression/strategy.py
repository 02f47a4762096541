"""Strategies as data: a frozen dataclass to and from its class path and settings."""

from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, TypeVar

from lightning_smoe.errors import InputError

T = TypeVar("T")


def to_spec(strategy: Any) -> dict[str, Any] | None:
    """Writes a strategy (a frozen dataclass) as its class path and settings, nested ones alike."""
    if strategy is None:
        return None
    kind = type(strategy)
    settings = {field.name: getattr(strategy, field.name) for field in fields(strategy)}
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": {name: _to_plain(value) for name, value in settings.items()},
    }


def _to_plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_to_plain(part) for part in value]
    return to_spec(value) if is_dataclass(value) else value


def from_spec(spec: Any, kind: type[T]) -> T:
    """Builds a strategy from its class path and settings.

    Args:
        spec: What `to_spec` wrote, or a person.
        kind: What it must be.

    Raises:
        InputError: There is no such class, it is of another kind, or it refuses its settings.
    """
    try:
        module, _, name = spec["class_path"].rpartition(".")
        strategy = getattr(import_module(module), name)
        settings = dict(spec.get("init_args", {}))
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{spec} does not describe a {kind.__name__}: {error}") from error
    # Before it is called: a plan must not be able to run any function there is.
    if not (is_dataclass(strategy) and isinstance(strategy, type) and issubclass(strategy, kind)):
        raise InputError(f"{spec['class_path']} is not a {kind.__name__}")
    for key, value in settings.items():
        if isinstance(value, dict) and "class_path" in value:
            settings[key] = from_spec(value, object)
    try:
        built: T = strategy(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"{spec} does not describe a {kind.__name__}: {error}") from error
    return built
