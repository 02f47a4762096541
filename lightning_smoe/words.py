"""The command line as a person types it: lists without brackets, folders without an option."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from jsonargparse import Namespace

from lightning_smoe.errors import InputError

# What the words right behind a verb are, before the first option.
POSITIONAL = {"compare": "runs"} | dict.fromkeys(
    ("inspect", "generate", "verify", "reshard"), "checkpoint"
)
_LISTS = {
    "evaluate": ("others", "tasks"),
    "sweep": ("recipes", "keep", "seeds"),
    "compare": ("runs",),
}


def spelled_out(words: Sequence[str], verb: str | None) -> list[str]:
    """Returns a command line as jsonargparse takes it.

    `inspect X` becomes `inspect --checkpoint X`, and `--keep 0.5 30` becomes
    `--keep [] --keep+=0.5 --keep+=30`.

    Args:
        words: Command line without the program's name.
        verb: The verb in it; none if there is none.
    """
    if verb is None:
        return list(words)
    place = words.index(verb) + 1
    done, rest = list(words[:place]), list(words[place:])
    if verb in POSITIONAL and rest and not rest[0].startswith("-"):
        rest.insert(0, f"--{POSITIONAL[verb]}")
    while rest:
        option, is_joined, first = rest.pop(0).partition("=")
        if option.removeprefix("--") not in _LISTS.get(verb, ()) or not option.startswith("--"):
            done.append(f"{option}{is_joined}{first}")
            continue
        values = [first] if is_joined else []
        while rest and not is_joined and not _is_option(rest[0]):
            values.append(rest.pop(0))
        done += _as_list(option, values)
    return done


def _is_option(word: str) -> bool:
    return word.startswith("-") and not word.removeprefix("-").replace(".", "", 1).isdigit()


def _as_list(option: str, values: list[str]) -> list[str]:
    if not values:
        return [option]
    if len(values) == 1 and (values[0].startswith("[") or values[0] in ("", "null")):
        return [f"{option}={values[0]}"]
    return [f"{option}=[]", *(f"{option}+={value}" for value in values)]


def check_kinds(settings: Mapping[str, Any] | Namespace, options: Iterable[Any]) -> None:
    """Refuses what a file may say and jsonargparse lets through: no group, or no value.

    Args:
        settings: What was asked of a verb.
        options: The verb's options, as argparse has them.

    Raises:
        InputError: A group of settings is something else, or an option that needs a value is null.
    """
    for name in ("model", "data", "trainer"):
        if not isinstance(settings.get(name, {}), dict | Namespace):
            raise InputError(
                f"{name} is {settings.get(name)!r}, not settings with names; write them below it"
            )
    for option in options:
        kind = getattr(option, "_typehint", None)
        is_optional = option.default is None or type(None) in get_args(kind)
        if not is_optional and settings.get(option.dest, option.default) is None:
            raise InputError(f"{option.dest} is null; leave it out, or give it a value")
