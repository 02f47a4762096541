"""Objectives on layers against loops over tokens, layers and experts."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.routing import Score
from lightning_smoe.training.layer_objectives import (
    BranchMSE,
    HiddenCosine,
    HiddenMSE,
    LayerObjective,
    LayerPair,
    LoadBalance,
    RouterKL,
    RouterZ,
)
from lightning_smoe.training.signals import LayerFacts, LayerSignals, Signal

TOKENS, HIDDEN, EXPERTS, SLOTS = 5, 4, 6, 3
ASSIGNMENT = torch.tensor([0, 2, -1, 1, 0, -1])
ROW_MAP = torch.tensor([0, 2, 1, 1, 0, 2])
OBJECTIVES: list[LayerObjective] = [
    HiddenMSE(), HiddenCosine(), BranchMSE(), RouterKL(), LoadBalance(), RouterZ(),
]  # fmt: skip
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def signals(num_experts: int, score: Score = "softmax", rows: Tensor | None = None) -> LayerSignals:
    """What a layer with random values did."""
    recorded: dict[Signal, Tensor] = {
        "hidden": draw(TOKENS, HIDDEN),
        "branch": draw(TOKENS, HIDDEN),
        "router_logits": 2 * draw(TOKENS, num_experts if rows is None else len(rows)),
        "expert_counts": torch.randint(0, 9, (num_experts,), generator=GENERATOR),
    }
    return LayerSignals(LayerFacts(3, "layer", num_experts, rows), recorded, score)


def pair(score: Score = "softmax", rows: Tensor | None = None) -> LayerPair:
    """A student with three experts and a teacher with six."""
    return LayerPair(signals(SLOTS, score, rows), signals(EXPERTS, score), ASSIGNMENT)


def masses(found: LayerSignals, token: int) -> list[float]:
    """Probabilities of router rows."""
    logits = found["router_logits"][token].tolist()
    is_softmax = found.score == "softmax"
    scores = [math.exp(x) if is_softmax else 1 / (1 + math.exp(-x)) for x in logits]
    return [score / sum(scores) for score in scores]


def grouped(rows: list[float], groups: Tensor) -> list[float]:
    """Sums over rows that go to the same slot, scaled to sum to one."""
    sums = [
        sum(mass for mass, group in zip(rows, groups.tolist(), strict=True) if group == slot)
        for slot in range(SLOTS)
    ]
    return [mass / sum(sums) for mass in sums]


def test_mse_is_the_mean_over_the_width() -> None:
    layer = pair()
    cases: list[tuple[LayerObjective, Signal]] = [(HiddenMSE(), "hidden"), (BranchMSE(), "branch")]
    for objective, name in cases:
        found = objective(layer)
        for token in range(TOKENS):
            both = zip(layer.student[name][token], layer.teacher[name][token], strict=True)
            wanted = sum(float(a - b) ** 2 for a, b in both) / HIDDEN
            assert found[token].item() == pytest.approx(wanted)


def test_cosine_is_one_minus_the_scaled_product() -> None:
    layer = pair()
    found = HiddenCosine()(layer)
    for token in range(TOKENS):
        a, b = layer.student["hidden"][token], layer.teacher["hidden"][token]
        assert found[token].item() == pytest.approx(1 - float(a @ b / (a.norm() * b.norm())))


@pytest.mark.parametrize("rows", [None, ROW_MAP])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_router_kl_compares_the_teachers_mass_of_each_group(
    score: Score, rows: Tensor | None
) -> None:
    layer = pair(score, rows)
    found = RouterKL()(layer)
    for token in range(TOKENS):
        p = grouped(masses(layer.teacher, token), ASSIGNMENT)
        q = masses(layer.student, token)
        q = q if rows is None else grouped(q, rows)
        wanted = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found[token].item() == pytest.approx(wanted)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_router_that_gives_each_group_its_mass_has_nothing_to_lose(score: Score) -> None:
    teacher = signals(EXPERTS, score)
    wanted = [grouped(masses(teacher, token), ASSIGNMENT) for token in range(TOKENS)]
    logits = torch.tensor(wanted, dtype=torch.float64).log()
    if score == "sigmoid":
        # Half of each mass, so that it is below one, as the output of a sigmoid.
        logits = torch.logit(logits.exp() / 2)
    logits.requires_grad_()
    student = LayerSignals(LayerFacts(3, "layer", SLOTS), {"router_logits": logits}, score)
    loss = RouterKL()(LayerPair(student, teacher, ASSIGNMENT))
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-14)
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-14)


def test_router_kl_of_a_layer_of_unknown_fate_is_refused() -> None:
    known = pair()
    with pytest.raises(ValueError, match="not known where the experts of layer went"):
        RouterKL()(LayerPair(known.student, known.teacher))


@pytest.mark.parametrize("rows", [None, ROW_MAP])
def test_balance_is_over_experts(rows: Tensor | None) -> None:
    layer = pair(rows=rows)
    counts = layer.student["expert_counts"].tolist()
    wanted = 0.0
    for token in range(TOKENS):
        probs = masses(layer.student, token)
        probs = probs if rows is None else grouped(probs, rows)
        wanted += sum(c / sum(counts) * p for c, p in zip(counts, probs, strict=True)) * SLOTS
    assert LoadBalance()(layer).mean().item() == pytest.approx(wanted / TOKENS)


def test_balance_without_a_single_token_is_zero() -> None:
    layer = pair()
    recorded = {**layer.student.recorded, "expert_counts": torch.zeros(SLOTS, dtype=torch.int64)}
    student = LayerSignals(layer.student.facts, recorded)
    assert not LoadBalance()(LayerPair(student, layer.teacher)).any()


def test_z_is_the_squared_log_sum() -> None:
    layer = pair()
    for token, value in enumerate(RouterZ()(layer).tolist()):
        total = sum(math.exp(logit) for logit in layer.student["router_logits"][token].tolist())
        assert value == pytest.approx(math.log(total) ** 2)


def narrowed(found: LayerSignals) -> LayerSignals:
    """The same signals in bfloat16."""
    signals = found.recorded.items()
    recorded = {n: t.bfloat16() if t.is_floating_point() else t for n, t in signals}
    return LayerSignals(found.facts, recorded, found.score)


def test_half_precision_is_read_in_float32() -> None:
    layer = pair()
    student, teacher = narrowed(layer.student), narrowed(layer.teacher)
    for objective in OBJECTIVES:
        found = objective(LayerPair(student, teacher, ASSIGNMENT))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, objective(layer).float(), rtol=0.2, atol=0.2)


def test_an_objective_concerns_the_layers_that_it_names_and_that_have_its_signals() -> None:
    layer = signals(SLOTS)
    dense = LayerSignals(LayerFacts(1), {"hidden": draw(TOKENS, HIDDEN)})
    assert HiddenMSE().concerns(layer)
    assert HiddenMSE().concerns(dense)
    assert not BranchMSE().concerns(dense)
    assert HiddenMSE(layers=[1]).concerns(dense)
    assert not HiddenMSE(layers=[1]).concerns(layer)


def test_names_and_needs() -> None:
    known = [(o.name, o.needs_teacher, o.needs_assignment) for o in OBJECTIVES]
    assert known == [
        ("hidden_mse", True, False),
        ("hidden_cosine", True, False),
        ("branch_mse", True, False),
        ("router_kl", True, True),
        ("load_balance", False, False),
        ("router_z", False, False),
    ]
    for objective in OBJECTIVES:
        with pytest.raises(ValueError, match="weight must be above 0"):
            replace(objective, weight=0.0)  # type: ignore[type-var]  # each is a dataclass
