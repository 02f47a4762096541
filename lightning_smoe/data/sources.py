"""Where the text of each domain lies."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TypeAlias

from lightning_smoe.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".parquet")
_SUFFIXES = ", ".join(SUFFIXES)


@dataclass(frozen=True)
class HubText:
    """One split of a dataset of the Hugging Face Hub; all of its rows are one domain.

    Args:
        name: Name on the Hub, such as `Salesforce/wikitext`.
        config: Configuration of the dataset; none takes its default one.
        split: Split of the dataset.
    """

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        config = "" if self.config is None else f":{self.config}"
        return f"hf://{self.name}{config}@{self.split}"


Source: TypeAlias = Path | HubText


def find_sources(location: str | Path, split: str) -> dict[str, list[Source]]:
    """Finds the text of each domain of a split, without reading it.

    A location is a folder of one file a domain (`python.txt`, `python.jsonl`, `python.parquet`) or
    of one sub-folder a domain, holding such files at any depth; or one such file; or
    `hf://NAME[:CONFIG][@SPLIT]`, a dataset of the Hugging Face Hub, which needs the network or
    a filled cache. Hidden files and `.md` files are passed over.

    Args:
        location: Folder, file or Hub name.
        split: One of train, calib, valid, test; names the option in errors, and the split on
            the Hub where the location does not (calib takes train, valid takes validation).

    Returns:
        Sources by domain, domains and files in alphabetical order.

    Raises:
        InputError: There is nothing there, or a file is of an unknown kind.
    """
    if str(location).startswith("hf:"):
        hub_text = _parse_hub_name(str(location), split)
        return {hub_text.name.rsplit("/", 1)[-1]: [hub_text]}
    path = Path(location).expanduser()
    if not path.exists():
        raise InputError(f"{path}: no such file or folder -> correct data.{split} or data.path")
    if path.is_file():
        return {path.stem: _known_files([path])}
    return _domains_of_folder(path)


def select_domains(
    sources: dict[str, list[Source]], domains: Sequence[str] | None, split: str
) -> dict[str, list[Source]]:
    """Keeps the named domains, or all where none are named.

    Args:
        sources: Sources by domain.
        domains: Names to keep; their order does not matter.
        split: Split the sources are of, for the error.

    Raises:
        InputError: A name is not among the domains, or the list of names is empty.
    """
    if domains is None:
        return sources
    if not domains:
        raise InputError("data.domains is an empty list -> name a domain, or null for all of them")
    for name in domains:
        if name not in sources:
            close = get_close_matches(name, sources, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(
                f"data.domains names {name!r}, which the {split} split does not have "
                f"-> {hint}it has: {', '.join(sources)}"
            )
    return {name: found for name, found in sources.items() if name in domains}


def _parse_hub_name(location: str, split: str) -> HubText:
    match = re.fullmatch(r"hf://([^:@]+)(?::([^:@]+))?(?:@(.+))?", location)
    if match is None:
        raise InputError(f"data.{split}={location} -> write hf://NAME[:CONFIG][@SPLIT]")
    name, config, hub_split = match.groups()
    return HubText(
        name, config, hub_split or {"calib": "train", "valid": "validation"}.get(split, split)
    )


def _domains_of_folder(folder: Path) -> dict[str, list[Source]]:
    domains: dict[str, list[Source]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            files = _known_files(sorted(file for file in entry.rglob("*") if file.is_file()))
            if not files:
                raise InputError(f"{entry}: holds no text files -> add {_SUFFIXES} or take it away")
            domains.setdefault(entry.name, []).extend(files)
        elif entry.is_file() and (files := _known_files([entry])):
            domains.setdefault(entry.stem, []).extend(files)
    if not domains:
        raise InputError(f"{folder}: holds no text -> add one file a domain ({_SUFFIXES})")
    return dict(sorted(domains.items()))


def _known_files(files: Iterable[Path]) -> list[Source]:
    texts = [f for f in files if f.suffix != ".md" and not f.name.startswith(".")]
    for file in texts:
        if file.suffix not in SUFFIXES:
            raise InputError(
                f"{file}: unknown kind of file {file.suffix!r} -> convert it to {_SUFFIXES}"
            )
    return list(texts)
