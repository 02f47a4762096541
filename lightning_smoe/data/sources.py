"""Where the text of each domain lies, and how it is read as documents."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

from lightning_smoe.errors import InputError

DOCUMENT_SEPARATOR = "\x1e"


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


def read_documents(source: Source, text_field: str) -> list[str]:
    """Reads the documents of one file or Hub dataset, leaving out those of white space only.

    A `.txt` file is cut at the character U+001E, and is one document where it has none. Each
    row of a `.jsonl` or `.parquet` file or of a Hub dataset is one document.

    Args:
        source: What `find_sources` found.
        text_field: Name of the field that holds the text of a row; `.txt` files have no rows.

    Raises:
        InputError: The file cannot be read as text, lacks the field, or holds no document.
    """
    if isinstance(source, HubText):
        rows = _read_hub(source, text_field)
    else:
        rows = READERS[source.suffix](source, text_field)
    documents = [text for text in rows if text.strip()]
    if not documents:
        raise InputError(f"{source}: holds no text -> fill it or take it away")
    return documents


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
        if file.suffix not in READERS:
            raise InputError(
                f"{file}: unknown kind of file {file.suffix!r} -> convert it to {_SUFFIXES}"
            )
    return list(texts)


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 at byte offset {error.start} -> convert it, "
            f"for example with iconv -f latin1 -t utf-8"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror} -> make it readable") from error


def _read_txt(path: Path, text_field: str) -> list[str]:  # noqa: ARG001 - as READERS asks
    return _read_utf8(path).split(DOCUMENT_SEPARATOR)


def _read_jsonl(path: Path, text_field: str) -> list[str]:
    texts = []
    # str.splitlines would also cut at U+001E and U+2028, which may stand inside a JSON string.
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where}: not JSON ({error.msg}) -> write one object a line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: a {type(row).__name__} -> write one object a line")
        _check_field(text_field, list(row), where)
        texts.append(_text(row[text_field], text_field, where))
    return texts


def _read_parquet(path: Path, text_field: str) -> list[str]:
    # Imported here because it is slow and few runs read parquet.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            _check_field(text_field, file.schema_arrow.names, str(path))
            values = file.read(columns=[text_field])[text_field].to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a readable parquet file ({error}) -> write it anew"
        ) from error
    return _texts(values, text_field, str(path))


def _read_hub(source: HubText, text_field: str) -> list[str]:
    # Imported here because it is slow and few runs read from the Hub.
    from datasets import load_dataset

    try:
        rows = load_dataset(source.name, source.config, split=source.split)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source}: cannot be loaded ({error}) -> correct its name, or give files instead"
        ) from error
    _check_field(text_field, rows.column_names, str(source))
    return _texts(rows[text_field], text_field, str(source))


def _check_field(text_field: str, fields: Sequence[str], where: str) -> None:
    if text_field not in fields:
        raise InputError(
            f"{where}: has no field {text_field!r} -> set data.text_field to one of: "
            f"{', '.join(fields)}"
        )


def _texts(values: Iterable[Any], text_field: str, where: str) -> list[str]:
    return [_text(v, text_field, f"{where}, row {n}") for n, v in enumerate(values, start=1)]


def _text(value: Any, text_field: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{where}: field {text_field!r} is a {type(value).__name__}, not text "
            f"-> write a string there or take the row away"
        )
    return value


READERS: dict[str, Callable[[Path, str], list[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
_SUFFIXES = ", ".join(READERS)
