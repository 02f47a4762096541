"""Rows of a prompt with its answer as tokens, of which those of the answer are marked."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_smoe.data.packing import tokenize
from lightning_smoe.data.rows import ASSISTANT, Chat, Document, Row
from lightning_smoe.errors import InputError

# What transformers looks for before it says which tokens are the assistant's.
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Characters of a row that an error quotes.
_QUOTED = 60


@dataclass(frozen=True, eq=False)
class RowTokens:
    """The tokens of a row.

    Args:
        ids: Token ids.
        is_answer: Whether a token is of an answer.
    """

    ids: Int64[Tensor, " tokens"]
    is_answer: Bool[Tensor, " tokens"]

    def __len__(self) -> int:
        """Counts the tokens."""
        return len(self.ids)


def check_template(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that the tokenizer can write the messages that there are.

    Raises:
        InputError: It has no chat template.
    """
    if tokenizer.chat_template is None and any(isinstance(d, Chat) for d in documents):
        raise InputError(
            f"rows of messages need a chat template, which the tokenizer in "
            f"{tokenizer.name_or_path} does not have -> put a chat_template.jinja into the "
            f"folder, or write rows of prompt and completion"
        )


def tokenize_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[RowTokens]:
    """Token ids of each row, with the answers marked.

    Prompt and answer are tokenised apart, as they are where a model is asked: no token spans
    their boundary, and a tokenizer that would join them does not. The end-of-text token is added to
    an answer at the end of a row, unless the chat template has written it.

    Args:
        rows: Rows of one domain.
        tokenizer: Gives token ids, the end-of-text token and the chat template.

    Raises:
        InputError: A chat template refuses a row, or does not show which tokens are answers.
    """
    is_marked = bool(_MARK.search(str(tokenizer.chat_template)))
    apart = [[] if is_marked and isinstance(row, Chat) else _pieces(row, tokenizer) for row in rows]
    texts = tokenize([text for pieces in apart for text, _ in pieces], tokenizer)
    tokens = iter(texts)
    found = []
    for row, pieces in zip(rows, apart, strict=True):
        if is_marked and isinstance(row, Chat):
            whole = _marked(row, tokenizer)
        else:
            ids = list(islice(tokens, len(pieces)))
            marks = [torch.full(t.shape, a) for t, (_, a) in zip(ids, pieces, strict=True)]
            whole = RowTokens(torch.cat(ids), torch.cat(marks))
        found.append(_ended(whole, row, tokenizer.eos_token_id))
    return found


def _ended(tokens: RowTokens, row: Row, end: int | None) -> RowTokens:
    closes = not isinstance(row, Chat) or row.messages[-1]["role"] == ASSISTANT
    if end is None or not closes or not tokens.is_answer.any():
        return tokens
    last = int(tokens.is_answer.nonzero().max())
    if bool((tokens.ids[last:] == end).any()):
        return tokens
    more = torch.tensor([end]), torch.tensor([True])
    return RowTokens(torch.cat([tokens.ids, more[0]]), torch.cat([tokens.is_answer, more[1]]))


def _pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    if not isinstance(row, Chat):
        return [(row.prompt, False), (row.answer, True)]
    whole, pieces, start = _render(row, tokenizer, len(row.messages)), [], 0
    for first, stop in _answers(row, tokenizer, whole):
        pieces += [(whole[start:first], False), (whole[first:stop], True)]
        start = stop
    return [*pieces, (whole[start:], False)]


def _answers(
    row: Chat, tokenizer: PreTrainedTokenizerBase, whole: str
) -> Iterator[tuple[int, int]]:
    """First and last character of each answer in the whole text, found by rendering its parts."""
    for index, message in enumerate(row.messages):
        if message["role"] != ASSISTANT:
            continue
        before = _render(row, tokenizer, index, add_generation_prompt=True)
        after = _render(row, tokenizer, index + 1)
        if not (whole.startswith(after) and after.startswith(before)):
            raise InputError(
                f"the chat template writes message {index + 1} of {_quoted(row)} differently when "
                f"others follow or when it asks for an answer, so answers cannot be told from "
                f"prompts -> mark them in it by {{% generation %}} ... {{% endgeneration %}}"
            )
        # What a template writes after the end-of-text token is no part of the answer.
        end = str(tokenizer.eos_token)
        stop = after.rfind(end, len(before))
        yield len(before), len(after) if stop < 0 else stop + len(end)


def _render(row: Chat, tokenizer: PreTrainedTokenizerBase, number: int, **options: Any) -> str:
    return str(_apply(row, tokenizer, number, tokenize=False, **options))


def _marked(row: Chat, tokenizer: PreTrainedTokenizerBase) -> RowTokens:
    encoded = _apply(
        row,
        tokenizer,
        len(row.messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return RowTokens(
        torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"]).bool()
    )


def _apply(row: Chat, tokenizer: PreTrainedTokenizerBase, number: int, **options: Any) -> Any:
    # Imported here because it is slow and few runs read messages.
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(row.messages[:number]), **options)
    except TemplateError as error:
        raise InputError(
            f"the chat template refuses the messages of {_quoted(row)}: {error} -> change them, "
            f"or take the row away"
        ) from error


def _quoted(row: Chat) -> str:
    return repr(row.text[:_QUOTED])
