"""Objectives on tokens against loops over the vocabulary, in full and on a teacher's likeliest."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.targets import FullTokens, TeacherTokens, TopTokens, UnknownTokens
from lightning_smoe.training.objective_names import distinct_names, logged_name
from lightning_smoe.training.objectives import (
    CrossEntropy,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedKL,
    TokenObjective,
    TopKKL,
)

TOKENS, VOCAB, TOP = 5, 11, 4
GENERATOR = torch.Generator().manual_seed(0)
TEACHER = 2 * torch.randn(TOKENS, VOCAB, generator=GENERATOR, dtype=torch.float64)
STUDENT = 2 * torch.randn(TOKENS, VOCAB, generator=GENERATOR, dtype=torch.float64)
TARGETS = torch.randint(VOCAB, (TOKENS,), generator=GENERATOR)

Masses = Sequence[float]


def kl(first: Masses, second: Masses) -> float:
    return sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))


def mix(first: Masses, second: Masses, share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(first, second, strict=True)]


def by_hand(objective: TokenObjective, p: Masses, q: Masses) -> float:
    """What an objective is, in the words of its paper; p is the teacher's, q the student's."""
    match objective:
        case ForwardKL() | TopKKL():
            return kl(p, q)
        case ReverseKL():
            return kl(q, p)
        case JensenShannon(beta=beta):
            m = mix(p, q, beta)
            return beta * kl(p, m) + (1 - beta) * kl(q, m)
        case SkewedKL(skew=skew, direction="forward"):
            return kl(p, mix(p, q, skew))
        case SkewedKL(skew=skew):
            return kl(q, mix(p, q, 1 - skew))
    raise TypeError(type(objective).__name__)


def classes(row: int, logits: Tensor, temperature: float, top_k: int) -> Masses:
    """Masses of the teacher's likeliest tokens, then of all others together."""
    wanted = (TEACHER[row] / temperature).softmax(-1).tolist()
    masses = (logits[row] / temperature).softmax(-1).tolist()
    order = sorted(range(VOCAB), key=lambda token: -wanted[token])
    rest = [sum(masses[token] for token in order[top_k:])] if top_k < VOCAB else []
    return [masses[token] for token in order[:top_k]] + rest


def every(temperature: float) -> list[TokenObjective]:
    """Each objective that compares with the teacher."""
    return [
        ForwardKL(temperature=temperature),
        ReverseKL(temperature=temperature),
        JensenShannon(beta=0.5, temperature=temperature),
        JensenShannon(beta=0.2, temperature=temperature),
        SkewedKL(skew=0.1, temperature=temperature),
        SkewedKL(skew=0.3, direction="reverse", temperature=temperature),
        TopKKL(top_k=TOP, temperature=temperature),
    ]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("is_coarse", [False, True])
def test_each_objective_is_the_sum_over_classes(is_coarse: bool, temperature: float) -> None:
    full = FullTokens(TEACHER)
    teacher: TeacherTokens = full.top(TOP, temperature) if is_coarse else full
    for objective in every(temperature):
        found = objective(teacher, STUDENT, TARGETS)
        top_k = TOP if is_coarse or isinstance(objective, TopKKL) else VOCAB
        for row in range(TOKENS):
            p = classes(row, TEACHER, temperature, top_k)
            q = classes(row, STUDENT, temperature, top_k)
            wanted = by_hand(objective, p, q) * temperature**2
            assert float(found[row]) == pytest.approx(wanted, rel=1e-10), objective


@pytest.mark.parametrize("is_coarse", [False, True])
def test_a_student_like_its_teacher_has_nothing_to_lose(is_coarse: bool) -> None:
    full = FullTokens(TEACHER)
    for objective in every(2.0):
        teacher = full.top(TOP, 2.0) if is_coarse else full
        student = TEACHER.clone().requires_grad_()
        loss = objective(teacher, student, TARGETS)
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-14)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


def test_the_gradient_of_forward_kl_is_the_difference_of_probabilities() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = ForwardKL()(FullTokens(TEACHER), student, TARGETS).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, STUDENT.softmax(-1) - TEACHER.softmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_are_those_of_finite_differences(temperature: float) -> None:
    for objective in every(temperature):
        student = STUDENT.clone().requires_grad_()
        coarse = FullTokens(TEACHER).top(TOP, temperature)
        for teacher in (FullTokens(TEACHER), coarse):
            assert torch.autograd.gradcheck(
                lambda x, t=teacher, o=objective: o(t, x, TARGETS), (student,)
            )


def test_gradients_hardly_depend_on_a_high_temperature() -> None:
    sizes = []
    for temperature in (50.0, 100.0):
        student = STUDENT.clone().requires_grad_()
        loss = ForwardKL(temperature=temperature)(FullTokens(TEACHER), student, TARGETS).sum()
        sizes.append(float(torch.autograd.grad(loss, student)[0].norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize("top_k", range(1, VOCAB + 2))
def test_top_k_kl_is_never_above_the_full_and_grows_to_it(top_k: int) -> None:
    full = ForwardKL()(FullTokens(TEACHER), STUDENT, TARGETS)
    found = TopKKL(top_k=top_k)(FullTokens(TEACHER), STUDENT, TARGETS)
    assert (found <= full + 1e-12).all()
    assert (TopKKL(top_k=top_k + 1)(FullTokens(TEACHER), STUDENT, TARGETS) >= found - 1e-12).all()
    if top_k >= VOCAB:
        assert torch.equal(found, full)


def test_top_k_kl_of_a_stored_teacher_is_that_of_the_teacher_itself() -> None:
    stored = FullTokens(TEACHER).top(8, 1.0)
    assert isinstance(stored, TopTokens)
    objective = TopKKL(top_k=3)
    torch.testing.assert_close(
        objective(stored, STUDENT, TARGETS), objective(FullTokens(TEACHER), STUDENT, TARGETS)
    )


def test_cross_entropy_is_that_of_torch_and_asks_no_teacher() -> None:
    found = CrossEntropy()(UnknownTokens(), STUDENT, TARGETS)
    for row, target in enumerate(TARGETS.tolist()):
        assert float(found[row]) == pytest.approx(-math.log(STUDENT[row].softmax(-1)[target]))
    assert not CrossEntropy().needs_teacher
    assert all(objective.needs_teacher for objective in every(1.0))


def test_half_precision_logits_are_compared_in_float32() -> None:
    narrow = STUDENT.bfloat16()
    teacher = FullTokens(TEACHER.bfloat16())
    for objective in [*every(1.0), CrossEntropy()]:
        found = objective(teacher, narrow, TARGETS)
        assert found.dtype == torch.float32
        assert torch.equal(found, objective(teacher, narrow.float(), TARGETS))


def test_names_in_logs_are_words_and_told_apart() -> None:
    objectives = [*every(1.0), CrossEntropy()]
    assert [objective.name for objective in objectives] == [
        "forward_kl", "reverse_kl", "jensen_shannon", "jensen_shannon", "skewed_kl", "skewed_kl",
        "top_k_kl", "cross_entropy",
    ]  # fmt: skip
    assert distinct_names([objective.name for objective in objectives[1:5]]) == [
        "reverse_kl", "jensen_shannon_1", "jensen_shannon_2", "skewed_kl",
    ]  # fmt: skip
    assert logged_name(type("HiddenMSE", (), {})) == "hidden_mse"


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_impossible_options_are_refused(value: float) -> None:
    for kind in (CrossEntropy, ForwardKL, ReverseKL, JensenShannon, SkewedKL, TopKKL):
        with pytest.raises(ValueError, match=r"weight.* must be above 0, and there is {'weight'"):
            kind(weight=value)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        ReverseKL(temperature=value)
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        JensenShannon(beta=value)
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        SkewedKL(skew=value)
    with pytest.raises(ValueError, match="top_k and temperature must be above 0"):
        TopKKL(top_k=0)
