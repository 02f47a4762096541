"""A split's documents as windows: cut, drawn within a budget, domains in turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lightning_smoe.data.choice import choose, interleave, keyed_generator
from lightning_smoe.data.packing import TokenWindows, pack, pad
from lightning_smoe.data.row_packing import window_rows
from lightning_smoe.data.rows import Document
from lightning_smoe.errors import InputError

_SMALLEST = {"sequence_length": 2, "batch_size": 1, "num_workers": 0}


def check_sizes(sizes: Mapping[str, int], budgets: Mapping[str, int | None]) -> None:
    """Checks sizes of sequences and batches, and budgets.

    Args:
        sizes: `sequence_length`, `batch_size` and `num_workers`.
        budgets: Budget in tokens by split; none for all.

    Raises:
        InputError: One is too small.
    """
    for name, value in sizes.items():
        if value < (least := _SMALLEST[name]):
            raise InputError(f"data.{name}={value} is too small -> set it to {least} or more")
    length = sizes["sequence_length"]
    for split, budget in budgets.items():
        if budget is not None and budget < length:
            raise InputError(
                f"data.{split}_tokens={budget} is less than one sequence of "
                f"data.sequence_length={length} -> raise it or shorten sequences"
            )


@dataclass(frozen=True)
class Windowing:
    """How documents become windows of tokens.

    Args:
        tokenizer: Gives token ids and special tokens.
        sequence_length: Tokens a window.
        pack: Whether a window holds several documents.
        answers_only: Whether only the answers of rows are to be learned.
        seed: Seed of the choice and the order of windows.
    """

    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    pack: bool
    answers_only: bool
    seed: int

    def windows_of(
        self, documents: Mapping[str, Sequence[Document]], max_tokens: int | None
    ) -> TokenWindows:
        """Windows of a split in balanced order.

        Args:
            documents: Documents by domain, of one kind within each.
            max_tokens: Budget in tokens, shared evenly among the domains; none takes all.

        Raises:
            InputError: A domain gives no token, or none to learn.
        """
        share = None if max_tokens is None else max_tokens // len(documents)
        parts, first = [], 0
        for domain, found in documents.items():
            windows = self._cut(found, domain, first)
            parts.append(choose(windows, share, keyed_generator(self.seed, domain)))
            first += len(found)
        return interleave(parts)

    def _cut(self, documents: Sequence[Document], domain: str, first: int) -> TokenWindows:
        texts = [document for document in documents if isinstance(document, str)]
        if texts:
            make = pack if self.pack else pad
            return make(
                texts, self.tokenizer, self.sequence_length, domain=domain, first_document=first
            )
        return window_rows(
            [document for document in documents if not isinstance(document, str)],
            self.tokenizer,
            self.sequence_length,
            domain=domain,
            first_document=first,
            pack=self.pack,
            answers_only=self.answers_only,
        )
