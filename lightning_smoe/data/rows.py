"""Rows of a prompt with its answer, recognised by their fields."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lightning_smoe.errors import InputError

Format: TypeAlias = Literal["auto", "text", "rows"]
ASSISTANT = "assistant"
# The first of them that a row has is read.
_FIELDS = (("messages",), ("prompt", "completion"), ("input", "output"))
# Beside the fields above they are part of the prompt in some datasets: leaving one out in silence
# would train on answers to questions that nobody asked.
_UNREAD = ("instruction", "system", "tools")


@dataclass(frozen=True)
class Completion:
    """A prompt with the answer to it.

    Args:
        prompt: What is given.
        answer: What is to be learned.
    """

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        """Prompt and answer."""
        return self.prompt + self.answer


@dataclass(frozen=True)
class Chat:
    """Messages of a conversation; those of the assistant are to be learned.

    Args:
        messages: Messages as a chat template reads them, each with `role` and `content`.
    """

    messages: tuple[dict[str, Any], ...]

    @property
    def text(self) -> str:
        """What is said, a message a line."""
        return "\n".join(message["content"] for message in self.messages)


Row: TypeAlias = Completion | Chat
Document: TypeAlias = str | Row


def text_of(document: Document) -> str:
    """The characters of a document, without those of a chat template."""
    return document if isinstance(document, str) else document.text


def fields_to_read(
    there: Sequence[str], where: str, text_field: str, form: Format
) -> tuple[str, ...]:
    """Names the fields of a row that hold what is to be read.

    Args:
        there: Names of the fields that it has.
        where: Place of the row, for the error.
        text_field: Field with the text of a row of plain text.
        form: Whether it is plain text, a prompt with its answer, or whatever its fields say.

    Raises:
        InputError: The row has none of the fields, or both text and an answer.
    """
    rows = [fields for fields in _FIELDS if all(name in there for name in fields)]
    is_text = text_field in there
    if form == "auto" and is_text and rows:
        raise InputError(
            f"{where}: has {text_field!r} and also {', '.join(rows[0])} -> set data.format to "
            f"text or to rows"
        )
    if form != "rows" and is_text:
        return (text_field,)
    if form == "text" or not rows:
        sought = f"field {text_field!r}" if form != "rows" else "answer"
        known = "" if form == "text" else f"; rows have {'; or '.join(map(', '.join, _FIELDS))}"
        raise InputError(
            f"{where}: has no {sought} -> set data.text_field to one of: {', '.join(there)}{known}"
        )
    if unread := [name for name in _UNREAD if name in there]:
        raise InputError(
            f"{where}: has {unread[0]!r} beside {', '.join(rows[0])}, which would not be read "
            f"-> join them into prompt and completion, or into messages"
        )
    return rows[0]


def to_document(row: Mapping[str, Any], fields: Sequence[str], where: str) -> Document:
    """Takes the document out of a row.

    Args:
        row: Values by field.
        fields: What `fields_to_read` named.
        where: Place of the row, for the error.

    Raises:
        InputError: A value is not text, or a message has no role and content.
    """
    if tuple(fields) == ("messages",):
        return _chat(row["messages"], where)
    for name in fields:
        if not isinstance(row[name], str):
            raise InputError(
                f"{where}: field {name!r} is a {type(row[name]).__name__}, not text "
                f"-> write a string there or take the row away"
            )
    texts = [row[name] for name in fields]
    return texts[0] if len(texts) == 1 else Completion(*texts)


def _chat(messages: Any, where: str) -> Chat:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: 'messages' is no list of messages -> write [{{role, content}}]")
    for number, message in enumerate(messages, start=1):
        is_message = isinstance(message, dict) and all(
            isinstance(message.get(name), str) for name in ("role", "content")
        )
        if not is_message:
            raise InputError(
                f"{where}: message {number} has no text in 'role' and 'content' -> write them, "
                f"or take the row away"
            )
    # Tables give every message the fields of all, empty where it has none.
    kept = ({k: v for k, v in message.items() if v is not None} for message in messages)
    return Chat(tuple(kept))
