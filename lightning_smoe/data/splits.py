"""The text of each split: where it lies, what it says, and that no two share any."""

from collections.abc import Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lightning_smoe.data.overlap import check_apart, check_sources, digests
from lightning_smoe.data.reading import read_documents
from lightning_smoe.data.row_tokens import check_template
from lightning_smoe.data.rows import Document, Format
from lightning_smoe.data.sources import Source, find_sources, select_domains
from lightning_smoe.errors import InputError

CORPUS = Path(__file__).parent / "corpus"
SPLITS = ("train", "calib", "valid", "test")


class SplitTexts:
    """The documents of all splits, each read when it is first needed.

    Args:
        locations: Where the text of a split comes from; none takes it from `path`.
        path: Folder with one sub-folder a split; none takes the shipped corpus.
        domains: Names of the domains to use; none uses all.
        text_field: Field with the text in rows.
        form: What rows hold.
    """

    def __init__(
        self,
        locations: Mapping[str, str | None],
        *,
        path: Path | None,
        domains: Sequence[str] | None,
        text_field: str,
        form: Format,
    ) -> None:
        self._locations, self._path, self._domains = locations, path, domains
        self._text_field, self._form = text_field, form
        self._documents: dict[str, dict[str, list[Document]]] = {}
        # Kept when the documents were taken: splits may be asked for one after the other.
        self._digests: dict[str, frozenset[bytes]] = {}

    def check(self, splits: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        """Reads splits that are used together, and checks that they can be.

        Args:
            splits: Their names; one may stand twice.
            tokenizer: Writes messages.

        Raises:
            InputError: Text cannot be found, read or written, or stands in two of the splits.
        """
        found = {split: chain(*self.sources(split).values()) for split in splits}
        check_sources(found)
        for split in splits:
            if split not in self._digests:
                documents = self._read(split)
                check_template(list(chain(*documents.values())), tokenizer)
                self._documents[split], self._digests[split] = documents, digests(documents)
        # By name: a verb may ask for a split twice.
        for first, second in combinations(found, 2):
            if self._digests[first] & self._digests[second]:
                # Read again for the message alone: it may no longer be in memory.
                check_apart(first, second, self._read(first), self._digests[second])

    def take(self, split: str) -> dict[str, list[Document]]:
        """Hands out the documents of each domain of a split; they are not kept.

        Raises:
            InputError: They cannot be read.
        """
        return self._documents.pop(split, None) or self._read(split)

    def sources(self, split: str) -> dict[str, list[Source]]:
        """Files and datasets of each domain of a split, domains in alphabetical order.

        Raises:
            InputError: There is no such split, or nothing where it should be.
        """
        if split not in SPLITS:
            raise InputError(f"there is no split {split!r} -> use one of {', '.join(SPLITS)}")
        location = self._locations[split] or self._folder(split)
        return select_domains(find_sources(location, split), self._domains, split)

    def _read(self, split: str) -> dict[str, list[Document]]:
        found = {}
        for domain, sources in self.sources(split).items():
            read = (read_documents(s, self._text_field, self._form) for s in sources)
            found[domain] = list(chain.from_iterable(read))
            if len({isinstance(document, str) for document in found[domain]}) > 1:
                raise InputError(
                    f"domain {domain!r} of the {split} split has plain text and rows of prompts "
                    f"with answers -> make two domains of it"
                )
        return found

    def _folder(self, split: str) -> Path:
        root = CORPUS if self._path is None else Path(self._path).expanduser()
        if not root.is_dir():
            raise InputError(f"data.path={root}: no such folder -> name one that exists")
        if not (root / split).is_dir():
            raise InputError(
                f"data.path={root}: has no sub-folder {split!r} "
                f"-> add it, or name the {split} text by data.{split}"
            )
        return root / split
