"""Rows as tokens, of which those of the answer are marked."""

from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerBase

from lightning_smoe.data.packing import load_tokenizer
from lightning_smoe.data.row_tokens import RowTokens, check_template, tokenize_rows
from lightning_smoe.data.rows import Chat, Completion
from lightning_smoe.errors import InputError
from tests.data.test_packing import CHECKPOINT

ANSWER = "{{ m.content }}{{ eos_token }}"
MARKED = "{% generation %}" + ANSWER + "{% endgeneration %}"
WITHOUT_END = "{{ m.content }}"


def template(answer: str) -> str:
    """A template that writes answers as given, and a line break after each message."""
    return (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'assistant' %}" + answer + "{% else %}{{ m.content }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )


def chat(*said: str) -> Chat:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return Chat(tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(said)))


def tokenizer_with(answer: str | None) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(CHECKPOINT)
    tokenizer.chat_template = None if answer is None else template(answer)
    return tokenizer


def split(row: RowTokens, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The text of each stretch that is, or is not, an answer."""
    stretches: list[tuple[list[int], bool]] = []
    for token, is_answer in zip(row.ids.tolist(), row.is_answer.tolist(), strict=True):
        if not stretches or stretches[-1][1] != is_answer:
            stretches.append(([], is_answer))
        stretches[-1][0].append(token)
    return [(str(tokenizer.decode(tokens)), is_answer) for tokens, is_answer in stretches]


def test_prompt_and_answer_are_tokenised_apart_and_the_answer_ends() -> None:
    tokenizer = tokenizer_with(None)
    rows = [Completion("The quick bro", "wn fox"), Completion("", "yes"), Completion("why?", "")]
    joined, alone, empty = tokenize_rows(rows, tokenizer)
    parts = [tokenizer.encode(t, add_special_tokens=False) for t in ("The quick bro", "wn fox")]
    assert joined.ids.tolist() == [*parts[0], *parts[1], tokenizer.eos_token_id]
    assert joined.is_answer.tolist() == [False] * len(parts[0]) + [True] * (len(parts[1]) + 1)
    assert alone.is_answer.all()
    assert not empty.is_answer.any()


@pytest.mark.parametrize("answer", [ANSWER, MARKED])
def test_the_assistants_messages_are_marked_and_the_template_ends_them(answer: str) -> None:
    tokenizer = tokenizer_with(answer)
    (row,) = tokenize_rows([chat("hi", "Hello!", "2+2?", "4")], tokenizer)
    assert split(row, tokenizer) == [
        ("<user>hi\n<assistant>", False),
        ("Hello!<|endoftext|>", True),
        ("\n<user>2+2?\n<assistant>", False),
        ("4<|endoftext|>", True),
        ("\n", False),
    ]


def test_an_end_is_added_where_the_template_writes_none() -> None:
    tokenizer = tokenizer_with(WITHOUT_END)
    rows = tokenize_rows([chat("hi", "Hello!"), chat("hi", "Hello!", "bye")], tokenizer)
    assert split(rows[0], tokenizer)[-1] == ("Hello!\n<|endoftext|>", True)
    assert split(rows[1], tokenizer)[-1] == ("<user>bye\n", False)


def test_a_tokenizer_without_a_template_is_refused_only_for_messages() -> None:
    tokenizer = tokenizer_with(None)
    check_template(["text", Completion("a", "b")], tokenizer)
    with pytest.raises(InputError, match=r"need a chat template.*-> put a chat_template\.jinja"):
        check_template([chat("hi", "Hello!")], tokenizer)


@pytest.mark.parametrize(
    ("answer", "said", "message"),
    [
        (
            "{% if loop.last %}(last) {% endif %}{{ m.content }}",
            ("hi", "Hello!", "2+2?", "4"),
            "writes message 2 of 'hi.*differently when others follow.*-> mark them in it",
        ),
        (
            "{{ raise_exception('no answers here') }}",
            ("hi", "Hello!"),
            "refuses the messages of 'hi.*no answers here -> change them",
        ),
    ],
)
def test_a_template_that_cannot_be_followed_is_refused(
    answer: str, said: Sequence[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tokenize_rows([chat(*said)], tokenizer_with(answer))
