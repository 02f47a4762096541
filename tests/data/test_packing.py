"""Documents as windows of tokens."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lightning_smoe.data import packing
from lightning_smoe.data.packing import TokenWindows, load_tokenizer, pack, pad, tokenize
from lightning_smoe.errors import InputError

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "qwen2moe-tiny-8dom"
DOCUMENTS = [f"Sort {n} 3 1: 1 3 {n}. The quick brown fox." for n in range(20)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(CHECKPOINT)


def stream(tokenizer: PreTrainedTokenizerBase, eos: int | None) -> tuple[list[int], list[int]]:
    """The slow way: every token of the joined documents, and the document it is from."""
    ids, numbers = [], []
    for number, text in enumerate(DOCUMENTS):
        document = tokenizer.encode(text, add_special_tokens=False)
        if eos is not None and number < len(DOCUMENTS) - 1:
            document = [*document, eos]
        ids += document
        numbers += [number] * len(document)
    return ids, numbers


def test_packed_windows_are_the_joined_documents_without_the_tail(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    windows = pack(DOCUMENTS, tokenizer, 16, domain="a", first_document=7)
    ids, numbers = stream(tokenizer, tokenizer.eos_token_id)
    full = len(ids) // 16 * 16
    assert windows.input_ids.flatten().tolist() == ids[:full]
    assert (windows.document - 7).flatten().tolist() == numbers[:full]
    assert windows.num_tokens == full
    assert windows.domain_names == ("a",)


def test_without_an_end_token_documents_are_joined_by_nothing() -> None:
    tokenizer = load_tokenizer(CHECKPOINT)
    tokenizer.eos_token = None
    windows = pack(DOCUMENTS, tokenizer, 16, domain="a")
    ids, _ = stream(tokenizer, None)
    assert windows.input_ids.flatten().tolist() == ids[: len(ids) // 16 * 16]


def test_a_tail_that_is_the_only_window_is_padded(tokenizer: PreTrainedTokenizerBase) -> None:
    windows = pack(["Sort 2 1"], tokenizer, 32, domain="a")
    expected = tokenizer.encode("Sort 2 1", add_special_tokens=False)
    size = len(expected)
    assert windows.input_ids.tolist() == [expected + [tokenizer.pad_token_id] * (32 - size)]
    assert windows.attention_mask.tolist() == [[1] * size + [0] * (32 - size)]
    assert windows.document.tolist() == [[0] * size + [-1] * (32 - size)]


def test_padding_gives_each_document_a_row(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["Sort 2 1", DOCUMENTS[0] * 9]
    windows = pad(texts, tokenizer, 24, domain="a", first_document=3)
    short, long = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    assert windows.input_ids[0, : len(short)].tolist() == short
    assert windows.input_ids[1].tolist() == long[:24]
    assert windows.attention_mask.sum(1).tolist() == [len(short), 24]
    assert windows.document[:, 0].tolist() == [3, 4]
    assert (windows.document[0, len(short) :] == -1).all()


def test_tokens_do_not_depend_on_the_documents_tokenised_together(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [ids.tolist() for ids in tokenize(DOCUMENTS, tokenizer)]
    monkeypatch.setattr(packing, "DOCUMENTS_PER_CALL", 3)
    assert [ids.tolist() for ids in tokenize(DOCUMENTS, tokenizer)] == whole


def test_documents_longer_than_the_context_are_tokenised_in_silence(
    capfd: pytest.CaptureFixture[str],
) -> None:
    tokenizer = load_tokenizer(CHECKPOINT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tokens,) = tokenize(["one two three " * 2000], tokenizer)
    assert len(tokens) > tokenizer.model_max_length
    assert capfd.readouterr() == ("", "")


def test_text_without_a_token_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    for make_windows in (pack, pad):
        with pytest.raises(InputError, match="domain 'law' gives no token -> add text"):
            make_windows([""], tokenizer, 8, domain="law")


def test_documents_without_a_token_keep_the_numbers_of_the_others(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for make_windows in (pack, pad):
        windows = make_windows(["", "Sort", ""], tokenizer, 8, domain="law")
        assert windows.document[windows.attention_mask.bool()].unique().tolist() == [1]


def numbered(domain: str, num_windows: int, length: int = 4) -> TokenWindows:
    """Full windows whose tokens are the number of the window."""
    ids = torch.arange(num_windows)[:, None].expand(-1, length).contiguous()
    return TokenWindows(
        ids, torch.ones_like(ids), ids, torch.zeros(num_windows, dtype=torch.int64), (domain,)
    )


def test_a_fingerprint_changes_with_tokens_masks_domains_and_names() -> None:
    first = numbered("a", 4)
    assert first.fingerprint() == numbered("a", 4).fingerprint()
    others = [numbered("a", 4) for _ in range(3)]
    others[0].input_ids[1, 1] += 1
    others[1].attention_mask[3, 3] = 0
    others[2].domain[0] = 1
    others += [numbered("b", 4), numbered("a", 8, 2), first.select(torch.tensor([1, 0, 2, 3]))]
    assert len({windows.fingerprint() for windows in [first, *others]}) == 7


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: no such folder -> name one that exists"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(InputError, match=r"has none of tokenizer\.json, .* -> copy"):
        load_tokenizer(tmp_path)
