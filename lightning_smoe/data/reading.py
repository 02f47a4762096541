"""Reading the text of a domain as documents."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_smoe.data.rows import Document, Format, fields_to_read, text_of, to_document
from lightning_smoe.data.sources import HubText, Source
from lightning_smoe.errors import InputError

DOCUMENT_SEPARATOR = "\x1e"


def read_documents(source: Source, text_field: str, form: Format = "auto") -> list[Document]:
    """Reads the documents of one file or Hub dataset, leaving out those of white space only.

    A `.txt` file is cut at the character U+001E, and is one document where it has none. Each
    row of a `.jsonl` or `.parquet` file or of a Hub dataset is one document: the text in
    `text_field`, or a prompt with its answer (`rows.py`).

    Args:
        source: What `find_sources` found.
        text_field: Name of the field that holds the text of a row; `.txt` files have no rows.
        form: What rows hold.

    Raises:
        InputError: The file cannot be read, lacks the fields, or holds no document.
    """
    found: Iterator[Document]
    if isinstance(source, HubText):
        found = _read_hub(source, text_field, form)
    elif source.suffix == ".jsonl":
        found = _read_jsonl(source, text_field, form)
    elif source.suffix == ".parquet":
        found = _read_parquet(source, text_field, form)
    else:
        found = _read_txt(source, form)
    documents = [document for document in found if text_of(document).strip()]
    if not documents:
        raise InputError(f"{source}: holds no text -> fill it or take it away")
    return documents


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


def _read_txt(path: Path, form: Format) -> Iterator[Document]:
    if form == "rows":
        raise InputError(f"{path}: holds text, not rows -> set data.format to auto or text")
    yield from _read_utf8(path).split(DOCUMENT_SEPARATOR)


def _read_jsonl(path: Path, text_field: str, form: Format) -> Iterator[Document]:
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
        yield to_document(row, fields_to_read(list(row), where, text_field, form), where)


def _read_parquet(path: Path, text_field: str, form: Format) -> Iterator[Document]:
    # Imported here because it is slow and few runs read parquet.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            fields = fields_to_read(file.schema_arrow.names, str(path), text_field, form)
            table = file.read(columns=list(fields))
    except (ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a readable parquet file ({error}) -> write it anew"
        ) from error
    return _rows({name: table[name].to_pylist() for name in fields}, fields, str(path))


def _read_hub(source: HubText, text_field: str, form: Format) -> Iterator[Document]:
    # Imported here because it is slow and few runs read from the Hub.
    from datasets import load_dataset

    try:
        rows = load_dataset(source.name, source.config, split=source.split)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source}: cannot be loaded ({error}) -> correct its name, or give files instead"
        ) from error
    fields = fields_to_read(rows.column_names, str(source), text_field, form)
    return _rows({name: rows[name] for name in fields}, fields, str(source))


def _rows(
    columns: Mapping[str, Sequence[Any]], fields: Sequence[str], where: str
) -> Iterator[Document]:
    for number, values in enumerate(zip(*columns.values(), strict=True), start=1):
        row = dict(zip(columns, values, strict=True))
        yield to_document(row, fields, f"{where}, row {number}")
