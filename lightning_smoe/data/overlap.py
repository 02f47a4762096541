"""Keeping the splits apart: no text of one stands in another."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from lightning_smoe.data.rows import Document, text_of
from lightning_smoe.data.sources import HubText, Source
from lightning_smoe.errors import InputError

# Characters from which on a document counts: shorter ones, such as headers, empty lines and
# one-word answers, recur in any text without telling a model anything.
SHORTEST = 200
# Characters of a document that an error quotes.
_QUOTED = 60
_ADVICE = (
    "a dataset of the Hub can be cut, such as data.calib=hf://NAME@train[:5%] beside "
    "data.train=hf://NAME@train[5%:]"
)


def check_sources(sources: Mapping[str, Iterable[Source]]) -> None:
    """Checks that no two splits read the same file or the same rows of a dataset.

    Args:
        sources: Sources by split.

    Raises:
        InputError: Two do.
    """
    places = {split: {_place(source) for source in found} for split, found in sources.items()}
    for first, second in combinations(places, 2):
        if shared := places[first] & places[second]:
            raise InputError(
                f"data.{first} and data.{second} both read {min(shared)}; a verb uses both -> "
                f"give each text of its own; {_ADVICE}"
            )


def digests(documents: Mapping[str, Sequence[Document]]) -> frozenset[bytes]:
    """Hashes of the documents that count, white space at their ends left out.

    Args:
        documents: Documents by domain.
    """
    return frozenset(digest for _, _, digest in _counted(documents))


def check_apart(
    first: str, second: str, documents: Mapping[str, Sequence[Document]], others: frozenset[bytes]
) -> None:
    """Refuses a document that stands in two splits.

    Args:
        first: Name of one split.
        second: Name of the other.
        documents: Documents of the first by domain.
        others: Digests of the second.

    Raises:
        InputError: There is one.
    """
    shared = [(domain, text) for domain, text, digest in _counted(documents) if digest in others]
    if shared:
        domain, text = shared[0]
        raise InputError(
            f"the {first} and {second} text share {len(shared)} documents of {SHORTEST} characters "
            f"or more; the first is of domain {domain!r} and begins {text[:_QUOTED]!r} -> take "
            f"them out of one of the two; {_ADVICE}"
        )


def _counted(documents: Mapping[str, Sequence[Document]]) -> Iterable[tuple[str, str, bytes]]:
    for domain, found in documents.items():
        for document in found:
            text = text_of(document).strip()
            if len(text) >= SHORTEST:
                # Lone surrogates, which JSON may hold, are no UTF-8.
                encoded = text.encode("utf-8", "surrogatepass")
                yield domain, text, hashlib.blake2b(encoded, digest_size=16).digest()


def _place(source: Source) -> str:
    return str(source) if isinstance(source, HubText) else str(source.resolve())
