"""What a teacher says, in full and as its likeliest tokens, against loops over the vocabulary."""

import math

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.targets import FullTokens, TopTokens, UnknownTokens, with_tail

VOCAB = 9
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 2 * torch.randn(4, VOCAB, generator=GENERATOR, dtype=torch.float64)
STUDENT = torch.randn(4, VOCAB, generator=GENERATOR, dtype=torch.float64)


def top(top_k: int) -> TopTokens:
    """The likeliest tokens of the teacher."""
    found = FullTokens(LOGITS).top(top_k, 1.0)
    assert isinstance(found, TopTokens)
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_named_tokens_are_the_likeliest_and_the_tail_is_the_rest(temperature: float) -> None:
    found = FullTokens(LOGITS).top(3, temperature)
    assert isinstance(found, TopTokens)
    for row in range(4):
        masses = (LOGITS[row] / temperature).softmax(-1).tolist()
        best = sorted(range(VOCAB), key=lambda token: -masses[token])
        assert found.indices[row].tolist() == best[:3]
        wanted = [math.log(masses[t]) for t in best[:3]] + [
            math.log(sum(masses[t] for t in best[3:]))
        ]
        assert found.log_probs(temperature)[row].tolist() == pytest.approx(wanted)


def test_another_models_mass_goes_to_the_same_classes() -> None:
    teacher = top(3)
    masses = STUDENT.softmax(-1)
    found = teacher.classes_of(STUDENT.log_softmax(-1)).exp()
    for row in range(4):
        named = [float(masses[row, token]) for token in teacher.indices[row]]
        assert found[row].tolist() == pytest.approx([*named, 1 - sum(named)])


def test_a_tail_of_next_to_nothing_keeps_its_digits() -> None:
    log_probs = torch.tensor([[0.0, -60.0, -61.0]]).log_softmax(-1)
    tail = with_tail(log_probs, torch.tensor([[0]]))[0, 1]
    assert float(tail) == pytest.approx(math.log(math.exp(-60) + math.exp(-61)), rel=1e-6)


def test_gradients_reach_named_tokens_and_tail() -> None:
    student = STUDENT.clone().requires_grad_()
    classes = top(3).classes_of(student.log_softmax(-1))
    (gradient,) = torch.autograd.grad(classes[:, -1].sum(), student)
    assert (gradient != 0).all()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(4, dtype=torch.float64))


def test_fewer_of_the_likeliest_are_those_of_the_whole() -> None:
    found, wanted = top(5).top(2, 1.0), top(2)
    assert isinstance(found, TopTokens)
    assert torch.equal(found.indices, wanted.indices)
    torch.testing.assert_close(found.known, wanted.known)
    same = top(5)
    assert same.top(5, 1.0) is same


def test_where_all_tokens_are_named_there_is_no_tail() -> None:
    whole = FullTokens(LOGITS)
    assert whole.top(VOCAB, 1.0) is whole
    order = LOGITS.argsort(-1, descending=True)
    everything = TopTokens(order, LOGITS.log_softmax(-1).gather(-1, order), 1.0)
    assert everything.classes_of(STUDENT.log_softmax(-1)).shape == (4, VOCAB)
    torch.testing.assert_close(everything.top(3, 1.0).log_probs(1.0), top(3).known)


def test_half_precision_logits_are_read_in_float32() -> None:
    logits: Tensor = LOGITS.bfloat16()
    assert torch.equal(FullTokens(logits).log_probs(2.0), (logits.float() / 2).log_softmax(-1))


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"known at temperature 1.0, not 2.0; use the same"):
        top(3).log_probs(2.0)
    with pytest.raises(ValueError, match=r"known at temperature 1.0, not 2.0; use the same"):
        top(3).top(2, 2.0)
    with pytest.raises(ValueError, match=r"top_k=4 tokens are wanted, but 3 .* lower top_k"):
        top(3).top(4, 1.0)
    with pytest.raises(ValueError, match=r"needs no teacher asked one"):
        UnknownTokens().top(3, 1.0).log_probs(1.0)
    assert UnknownTokens().classes_of(STUDENT) is STUDENT
