"""Documents as windows of tokens: packed or padded, chosen by a budget, interleaved by domain."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Int64
from torch import Generator, Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_smoe.errors import InputError

# Documents tokenised in one call: bounds the memory that the tokenizer's own records take.
# Without any of them transformers 5 builds an empty tokenizer instead of failing.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
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
    """

    input_ids: Int64[Tensor, "batch sequence"]
    attention_mask: Int64[Tensor, "batch sequence"]
    document: Int64[Tensor, "batch sequence"]
    domain: Int64[Tensor, " batch"]
    domain_names: tuple[str, ...]

    def __len__(self) -> int:
        """Counts the windows."""
        return len(self.input_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens in all windows, padding left out."""
        return int(self.attention_mask.sum())

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name, windows on their first axis."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def select(self, rows: Int64[Tensor, " batch"]) -> "TokenWindows":
        """Takes the named windows, in that order."""
        taken = {name: tensor[rows] for name, tensor in self.tensors().items()}
        return TokenWindows(domain_names=self.domain_names, **taken)

    def describe(self) -> str:
        """Says in one line how many tokens and windows there are, and of which domains."""
        num_windows, length = self.input_ids.shape
        counts = self.domain.bincount(minlength=len(self.domain_names)).tolist()
        domains = (f"{name} {n}" for name, n in zip(self.domain_names, counts, strict=True))
        return f"{self.num_tokens} tokens in {num_windows} x {length} ({', '.join(domains)})"

    def fingerprint(self) -> str:
        """SHA-256 over the token ids, the mask, and the domains' ids and names, in this order."""
        digest = hashlib.sha256(repr((self.input_ids.shape, self.domain_names)).encode())
        for tensor in (self.input_ids, self.attention_mask, self.domain):
            digest.update(tensor.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


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
    return _stack(
        torch.cat(tokens).split(sequence_length)[:num_windows],
        document.split(sequence_length)[:num_windows],
        _blank(num_windows, sequence_length, tokenizer, domain),
    )


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
    tokens = [ids[:sequence_length] for ids in tokens]
    document = [torch.full_like(ids, n) for ids, n in zip(tokens, numbers, strict=True)]
    return _stack(tokens, document, _blank(len(tokens), sequence_length, tokenizer, domain))


def choose(windows: TokenWindows, max_tokens: int | None, generator: Generator) -> TokenWindows:
    """Draws windows in random order, as many as fit in a budget; a smaller budget takes a prefix.

    Args:
        windows: Windows of one domain.
        max_tokens: Budget in tokens, padding not counted; at least one window is taken. None
            takes all.
        generator: Source of the order.
    """
    order = torch.randperm(len(windows), generator=generator)
    if max_tokens is not None:
        spent = windows.attention_mask.sum(1)[order].cumsum(0)
        order = order[: max(1, int((spent <= max_tokens).sum()))]
    return windows.select(order)


def interleave(parts: Sequence[TokenWindows]) -> TokenWindows:
    """Deals the windows of several domains in turn, so that each prefix is balanced.

    Args:
        parts: Windows of one domain each, all of one length; one that runs out is passed over.
    """
    names = ("input_ids", "attention_mask", "document")
    joined = TokenWindows(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
        domain=torch.cat([torch.full_like(part.domain, i) for i, part in enumerate(parts)]),
        domain_names=tuple(name for part in parts for name in part.domain_names),
    )
    turn = torch.cat([torch.arange(len(part)) for part in parts])
    return joined.select(torch.argsort(turn, stable=True))


def _number(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, domain: str, first: int
) -> tuple[list[Tensor], list[int]]:
    numbered = [(ids, n) for n, ids in enumerate(tokenize(documents, tokenizer), first) if len(ids)]
    if not numbered:
        raise InputError(f"the text of domain {domain!r} gives no token -> add text")
    return [ids for ids, _ in numbered], [n for _, n in numbered]


def _blank(
    num_windows: int, sequence_length: int, tokenizer: PreTrainedTokenizerBase, domain: str
) -> TokenWindows:
    known = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None]
    shape = (num_windows, sequence_length)
    return TokenWindows(
        input_ids=torch.full(shape, known[0]),
        attention_mask=torch.zeros(shape, dtype=torch.int64),
        document=torch.full(shape, -1),
        domain=torch.zeros(num_windows, dtype=torch.int64),
        domain_names=(domain,),
    )


def _stack(
    tokens: Sequence[Tensor], documents: Sequence[Tensor], windows: TokenWindows
) -> TokenWindows:
    for row, (ids, numbers) in enumerate(zip(tokens, documents, strict=True)):
        windows.input_ids[row, : len(ids)] = ids
        windows.attention_mask[row, : len(ids)] = 1
        windows.document[row, : len(ids)] = numbers
    return windows
