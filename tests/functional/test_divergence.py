"""Divergences against loops over the vocabulary."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from lightning_smoe.functional.divergence import (
    divergence,
    jensen_shannon,
    kl_divergence,
    log_probabilities,
    mixture,
    token_nll,
)

GENERATOR = torch.Generator().manual_seed(0)
TEACHER = torch.randn(2, 3, 7, generator=GENERATOR)
STUDENT = torch.randn(2, 3, 7, generator=GENERATOR)


def test_equal_logits_have_no_divergence() -> None:
    assert torch.equal(kl_divergence(TEACHER, TEACHER), torch.zeros(2, 3))


def test_adding_a_constant_to_logits_changes_nothing() -> None:
    shifted = kl_divergence(TEACHER + 5, STUDENT - 3)
    torch.testing.assert_close(shifted, kl_divergence(TEACHER, STUDENT), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_divergence_is_the_sum_over_the_vocabulary(temperature: float) -> None:
    p = (TEACHER[1, 2] / temperature).softmax(-1)
    q = (STUDENT[1, 2] / temperature).softmax(-1)
    loop = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
    result = kl_divergence(TEACHER, STUDENT, temperature)
    assert float(result[1, 2]) == pytest.approx(loop * temperature**2, rel=1e-4)


def test_mean_divergence_is_torch_kl_div() -> None:
    p, q = TEACHER.log_softmax(-1).flatten(0, 1), STUDENT.log_softmax(-1).flatten(0, 1)
    expected = kl_div(q, p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(kl_divergence(TEACHER, STUDENT).mean(), expected)


def test_half_precision_logits_are_compared_in_float32() -> None:
    teacher, student = TEACHER.bfloat16(), STUDENT.bfloat16()
    result = kl_divergence(teacher, student)
    assert torch.equal(result, kl_divergence(teacher.float(), student.float()))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperatures_that_are_not_positive_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        kl_divergence(TEACHER, STUDENT, temperature)


def test_gradient_of_the_divergence_is_the_difference_of_probabilities() -> None:
    student = STUDENT.clone().requires_grad_()
    kl_divergence(TEACHER, student).sum().backward()
    torch.testing.assert_close(student.grad, STUDENT.softmax(-1) - TEACHER.softmax(-1))


def test_nll_is_minus_the_log_probability_of_the_target() -> None:
    targets = torch.tensor([[0, 6, 2], [3, 3, 1]])
    result = token_nll(TEACHER, targets)
    for row in range(2):
        for column in range(3):
            probability = TEACHER[row, column].softmax(-1)[targets[row, column]]
            assert float(result[row, column]) == pytest.approx(-math.log(probability), rel=1e-5)
    torch.testing.assert_close(
        result.mean(), cross_entropy(TEACHER.flatten(0, 1), targets.flatten())
    )


def test_nll_takes_any_number_of_axes() -> None:
    single = token_nll(TEACHER[0, 0], torch.tensor(4))
    assert single.shape == ()
    assert single == token_nll(TEACHER, torch.full((2, 3), 4))[0, 0]


def test_nll_of_padding_is_zero() -> None:
    assert token_nll(TEACHER[0], torch.tensor([1, -100, 2]))[1] == 0


def test_double_precision_stays_and_half_precision_does_not() -> None:
    assert log_probabilities(TEACHER.double(), 2.0).dtype == torch.float64
    assert log_probabilities(TEACHER.half()).dtype == torch.float32
    assert torch.equal(log_probabilities(TEACHER, 2.0), (TEACHER / 2).log_softmax(-1))


def test_a_mixture_has_a_share_of_each_side() -> None:
    p, q = TEACHER.log_softmax(-1), STUDENT.log_softmax(-1)
    torch.testing.assert_close(mixture(p, q, 0.3).exp(), 0.3 * p.exp() + 0.7 * q.exp())


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_the_sum_over_classes(beta: float) -> None:
    p, q = TEACHER.softmax(-1), STUDENT.softmax(-1)
    found = jensen_shannon(p.log(), q.log(), beta)
    for row in range(2):
        for column in range(3):
            total = 0.0
            for a, b in zip(p[row, column].tolist(), q[row, column].tolist(), strict=True):
                m = beta * a + (1 - beta) * b
                total += beta * a * math.log(a / m) + (1 - beta) * b * math.log(b / m)
            assert float(found[row, column]) == pytest.approx(total, rel=1e-4)


def test_jensen_shannon_near_either_end_is_a_kl() -> None:
    p, q = TEACHER.double().log_softmax(-1), STUDENT.double().log_softmax(-1)
    share = 1e-6
    low = jensen_shannon(p, q, share) / share
    torch.testing.assert_close(low, divergence(p, q), rtol=1e-4, atol=1e-4)
    high = jensen_shannon(p, q, 1 - share) / share
    torch.testing.assert_close(high, divergence(q, p), rtol=1e-4, atol=1e-4)
