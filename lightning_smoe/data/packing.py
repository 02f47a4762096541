"""Documents as windows of tokens, packed or padded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_smoe.errors import InputError

# Without any of them transformers 5 builds an empty tokenizer instead of failing.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Documents tokenised in one call: bounds the memory that the tokenizer's own records take.
DOCUMENTS_PER_CALL = 512


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of tokens of equal length, one a row.

    Args:
        input_ids: Token ids; padding stands at the right end only.
        attention_mask: 1 for a token, 0 for padding.
        document: Number of the document of each token, counted through a split; -1 for padding.
        domain: Index of each window's domain in `domain_names`.
        domain_names: Names of the domains, sorted.
        is_answer: Whether a token is to be learned; none where every token is.
        position_ids: Position of each token in its document, starting anew at padding too; none
            where the documents of a window see each other.
    """

    input_ids: Int64[Tensor, "batch sequence"]
    attention_mask: Int64[Tensor, "batch sequence"]
    document: Int64[Tensor, "batch sequence"]
    domain: Int64[Tensor, " batch"]
    domain_names: tuple[str, ...]
    is_answer: Bool[Tensor, "batch sequence"] | None = None
    position_ids: Int64[Tensor, "batch sequence"] | None = None

    def __len__(self) -> int:
        """Counts the windows."""
        return len(self.input_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens in all windows, padding left out."""
        return int(self.attention_mask.sum())

    @property
    def isolated(self) -> bool:
        """Whether the documents of a window must not see each other."""
        return self.position_ids is not None

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of a batch by name, windows on their first axis."""
        every = {"is_answer": self.attention_mask.bool()} if self.is_answer is None else {}
        return self._stored() | every

    def select(self, rows: Int64[Tensor, " batch"]) -> "TokenWindows":
        """Takes the named windows, in that order."""
        taken = {name: tensor[rows] for name, tensor in self._stored().items()}
        return TokenWindows(domain_names=self.domain_names, **taken)

    def describe(self) -> str:
        """Says in one line how many tokens and windows there are, and of which domains."""
        num_windows, length = self.input_ids.shape
        counts = self.domain.bincount(minlength=len(self.domain_names)).tolist()
        domains = (f"{name} {n}" for name, n in zip(self.domain_names, counts, strict=True))
        return f"{self.num_tokens} tokens in {num_windows} x {length} ({', '.join(domains)})"

    def fingerprint(self) -> str:
        """SHA-256 over the token ids, the mask, and the domains' ids and names, in this order.

        Then over `is_answer` and `position_ids`, where there are any: text without them keeps
        the fingerprint that it had before there were rows.
        """
        digest = hashlib.sha256(repr((self.input_ids.shape, self.domain_names)).encode())
        for tensor in (self.input_ids, self.attention_mask, self.domain):
            digest.update(tensor.contiguous().numpy().astype("<i8").tobytes())
        for name in ("is_answer", "position_ids"):
            if (found := getattr(self, name)) is not None:
                digest.update(name.encode() + found.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def _stored(self) -> dict[str, Tensor]:
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a checkpoint folder, without the network.

    Args:
        folder: Folder with tokenizer.json and tokenizer_config.json.

    Raises:
        InputError: There is no such folder, or no tokenizer in it.
    """
    if not folder.is_dir():
        raise InputError(f"data.tokenizer={folder}: no such folder -> name one that exists")
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise InputError(
            f"data.tokenizer={folder}: has none of {', '.join(_TOKENIZER_FILES)} "
            "-> copy the tokenizer's files into it"
        )
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"data.tokenizer={folder}: holds no tokenizer that can be loaded "
            f"-> copy tokenizer.json and tokenizer_config.json into it"
        ) from error
    return cast(PreTrainedTokenizerBase, loaded)


def tokenize(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Int64[Tensor, " _"]]:
    """Token ids of each document, without the special tokens that a tokenizer would add."""
    tokens: list[Tensor] = []
    for start in range(0, len(documents), DOCUMENTS_PER_CALL):
        # verbose=False: a document may be longer than the model's context, it is cut later.
        encoded = tokenizer(
            list(documents[start : start + DOCUMENTS_PER_CALL]),
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
        tokens.extend(torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"])
    return tokens


def pack(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    domain: str,
    first_document: int = 0,
) -> TokenWindows:
    """Joins documents by the end-of-text token and cuts them into full windows.

    The tail that does not fill a window is dropped, unless it is the only window: then it is
    padded. A tokenizer without an end-of-text token joins them by nothing.

    Args:
        documents: Texts of one domain.
        tokenizer: Gives token ids, the end-of-text token and the padding token.
        sequence_length: Tokens a window.
        domain: Name of the domain.
        first_document: Number of the first document.

    Raises:
        InputError: The texts give no token.
    """
    tokens, numbers = _number(documents, tokenizer, domain, first_document)
    if tokenizer.eos_token_id is not None:
        end = torch.tensor([tokenizer.eos_token_id])
        tokens = [torch.cat([ids, end]) for ids in tokens[:-1]] + tokens[-1:]
    document = torch.cat([torch.full_like(ids, n) for ids, n in zip(tokens, numbers, strict=True)])
    num_windows = max(1, len(document) // sequence_length)
    windows = blank_windows(num_windows, sequence_length, tokenizer, domain)
    for row, ids in enumerate(torch.cat(tokens).split(sequence_length)[:num_windows]):
        place(windows, row, 0, ids=ids, document=document[row * sequence_length :][: len(ids)])
    return windows


def pad(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    domain: str,
    first_document: int = 0,
) -> TokenWindows:
    """Gives each document a window of its own, truncated or padded at the right end.

    Args:
        documents: Texts of one domain; one that gives no token gets no window.
        tokenizer: Gives token ids and the padding token.
        sequence_length: Tokens a window.
        domain: Name of the domain.
        first_document: Number of the first document.

    Raises:
        InputError: The texts give no token.
    """
    tokens, numbers = _number(documents, tokenizer, domain, first_document)
    windows = blank_windows(len(tokens), sequence_length, tokenizer, domain)
    for row, (ids, number) in enumerate(zip(tokens, numbers, strict=True)):
        place(windows, row, 0, ids=ids[:sequence_length], document=number)
    return windows


def blank_windows(
    num_windows: int, sequence_length: int, tokenizer: PreTrainedTokenizerBase, domain: str
) -> TokenWindows:
    """Windows of padding, to be filled by `place`.

    Args:
        num_windows: How many.
        sequence_length: Tokens a window.
        tokenizer: Gives the padding token.
        domain: Name of the domain.
    """
    known = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None]
    shape = (num_windows, sequence_length)
    return TokenWindows(
        input_ids=torch.full(shape, known[0]),
        attention_mask=torch.zeros(shape, dtype=torch.int64),
        document=torch.full(shape, -1),
        domain=torch.zeros(num_windows, dtype=torch.int64),
        domain_names=(domain,),
    )


def place(
    windows: TokenWindows,
    row: int,
    start: int,
    *,
    ids: Int64[Tensor, " tokens"],
    document: Int64[Tensor, " tokens"] | int,
) -> None:
    """Writes tokens into a window.

    Args:
        windows: Where to.
        row: Which window.
        start: Position of the first token.
        ids: The tokens, which fit.
        document: Number of the document of each, or of all.
    """
    stretch = slice(start, start + len(ids))
    windows.input_ids[row, stretch] = ids
    windows.attention_mask[row, stretch] = 1
    windows.document[row, stretch] = document


def _number(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, domain: str, first: int
) -> tuple[list[Tensor], list[int]]:
    numbered = [(ids, n) for n, ids in enumerate(tokenize(documents, tokenizer), first) if len(ids)]
    if not numbered:
        raise InputError(f"the text of domain {domain!r} gives no token -> add text")
    return [ids for ids, _ in numbered], [n for _, n in numbered]
