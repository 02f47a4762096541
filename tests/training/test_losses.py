"""The loss of a batch on real tiny models: by hand, however it is batched, padded or computed."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.data.positions import counted_positions
from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.training import losses
from lightning_smoe.training.layer_objectives import (
    BranchMSE,
    HiddenCosine,
    HiddenMSE,
    LayerObjective,
    LoadBalance,
    RouterKL,
    RouterZ,
)
from lightning_smoe.training.losses import BatchLoss, Losses
from lightning_smoe.training.objectives import CrossEntropy, ForwardKL, ReverseKL, TokenObjective
from lightning_smoe.training.position_values import position_values
from lightning_smoe.training.teacher import LiveTeacher
from tests.families import NUM_EXPERTS, build
from tests.models.sharing import assignment_of, share
from tests.training.token_batches import batch, longer, rows_of

KEPT = 8
Objectives = Sequence[TokenObjective | LayerObjective]
LAYERS: list[TokenObjective | LayerObjective] = [
    HiddenMSE(), HiddenCosine(layers=[1]), BranchMSE(), RouterKL(), LoadBalance(), RouterZ(),
]  # fmt: skip


class Pair:
    """A student that lost experts, its teacher, and where the experts went."""

    def __init__(self, family: str = "qwen2_moe", *, shares: bool = False) -> None:
        self.teacher = build(family)
        self.student = copy.deepcopy(self.teacher)
        layers = find_moe_layers(self.student)
        self.assignments: dict[str, Tensor] = {}
        for place, layer in enumerate(layers):
            kept = torch.arange(NUM_EXPERTS)
            one = assignment_of(place) if shares else kept.masked_fill(kept >= KEPT, -1)
            self.assignments[layer.name] = one
            if not shares:
                layer.select(kept[:KEPT])
        if shares:
            share(self.student)

    def losses(self, objectives: Objectives, **options: Any) -> Losses:
        layers = find_moe_layers(self.student)
        return Losses(self.student, layers, objectives, self.assignments, **options)

    def of(self, objectives: Objectives, found: dict[str, Tensor], **options: Any) -> BatchLoss:
        taken = self.losses(objectives, **options)
        teacher = LiveTeacher(self.teacher, signals=taken.teacher_signals)
        return taken(teacher, found)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        self.student.zero_grad()
        loss.backward()
        named = self.student.named_parameters()
        return {n: p.grad.clone() for n, p in named if p.grad is not None}


def masked(model: PreTrainedModel, found: dict[str, Tensor]) -> Tensor:
    """Logits at counted positions, by the model itself."""
    inputs = {name: found[name] for name in ("input_ids", "attention_mask")}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[counted_positions(found)]


def test_losses_by_hand_are_those_of_the_batch() -> None:
    models, found = Pair(), batch()
    loss = models.of([ForwardKL(), CrossEntropy(weight=0.5)], found)
    student = masked(models.student, found).log_softmax(-1)
    teacher = masked(models.teacher, found).detach().log_softmax(-1)
    targets = torch.tensor(
        [int(found["input_ids"][r, p + 1]) for r, p in counted_positions(found).nonzero().tolist()]
    )
    kl = sum(
        float((p.exp() * (p - q)).sum()) for p, q in zip(teacher, student.detach(), strict=True)
    )
    nll = sum(-float(row[target]) for row, target in zip(student.detach(), targets, strict=True))
    assert loss.num_tokens == len(targets) == 9 + 7 + 11
    assert list(loss.sums) == ["forward_kl", "cross_entropy"]
    assert loss.sums["forward_kl"].item() == pytest.approx(kl, rel=1e-5)
    assert loss.sums["cross_entropy"].item() == pytest.approx(nll, rel=1e-5)
    assert loss.total.item() == pytest.approx(kl + 0.5 * nll, rel=1e-5)
    by_hand = (teacher.exp() * (teacher - student)).sum() - 0.5 * student.gather(
        1, targets[:, None]
    ).sum()
    wanted, gradients = models.gradients(by_hand), models.gradients(loss.total)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-4)


def test_small_chunks_change_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    models, found = Pair("granitemoe"), batch()
    models.student.lm_head.weight = models.student.get_input_embeddings().weight
    whole = models.of([ForwardKL(temperature=2.0), CrossEntropy()], found)
    wanted = models.gradients(whole.total)
    monkeypatch.setattr(losses, "chunk_size_of", lambda _: 4)
    small = models.of([ForwardKL(temperature=2.0), CrossEntropy()], found)
    assert small.total.item() == pytest.approx(whole.total.item(), rel=1e-6)
    for name, gradient in models.gradients(small.total).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "mixtral"])
def test_sums_do_not_depend_on_padding_or_on_what_shares_a_batch(family: str, shares: bool) -> None:
    models, found = Pair(family, shares=shares), batch()
    # A load is one of a whole batch.
    objectives: Objectives = [ForwardKL(), *(o for o in LAYERS if not isinstance(o, LoadBalance))]
    with torch.no_grad():
        whole = models.of(objectives, found)
        padded = models.of(objectives, longer(found, 5))
        parts = [models.of(objectives, rows_of(found, slice(r, r + 1))) for r in range(3)]
    assert padded.num_tokens == whole.num_tokens == sum(part.num_tokens for part in parts)
    for name, value in whole.sums.items():
        assert value.item() > 0
        assert padded.sums[name].item() == pytest.approx(value.item(), rel=1e-4)
        total = sum(part.sums[name].item() for part in parts)
        assert total == pytest.approx(value.item(), rel=1e-4)


def test_a_student_like_its_teacher_has_nothing_to_lose() -> None:
    models, found = Pair(), batch()
    models.student = copy.deepcopy(models.teacher)
    models.assignments = {n: torch.arange(NUM_EXPERTS) for n in models.assignments}
    compared: Objectives = [
        ForwardKL(),
        ReverseKL(),
        HiddenMSE(),
        HiddenCosine(),
        BranchMSE(),
        RouterKL(),
    ]
    for name, value in models.of(compared, found).sums.items():
        assert abs(value.item()) < 1e-4, name


def test_balance_counts_the_tokens_of_all_processes() -> None:
    models, found = Pair(), batch()
    whole = models.of([LoadBalance(weight=1.0)], found)
    halves = [rows_of(found, slice(0, 1)), rows_of(found, slice(1, 3))]
    seen: list[Tensor] = []

    def note(counts: Tensor) -> Tensor:
        seen.append(counts)
        return counts

    for half in halves:
        models.of([LoadBalance()], half, reduce=note)
    assert len(seen) == 2
    parts = [
        models.of([LoadBalance(weight=1.0)], half, reduce=lambda _: seen[0] + seen[1])
        for half in halves
    ]
    total = torch.stack([part.total for part in parts]).sum()
    torch.testing.assert_close(total, whole.total)
    wanted, gradients = models.gradients(whole.total), models.gradients(total)
    assert any("gate" in name for name in wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    models, found = Pair(family), batch()
    models.student.train()
    objectives: Objectives = [ForwardKL(), *LAYERS]
    wanted = models.gradients(models.of(objectives, found).total)
    models.student.activation_checkpointing_enable({"use_reentrant": False})
    for name, gradient in models.gradients(models.of(objectives, found).total).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4)


def test_a_batch_that_only_fills_up_gives_zero_and_gradients_of_zero() -> None:
    models, found = Pair(), batch()
    found["valid"][:] = False
    loss = models.of([ForwardKL(), *LAYERS], found)
    assert loss.num_tokens == 0
    assert all(value == 0 for value in loss.sums.values())
    gradients = models.gradients(loss.total)
    assert {"lm_head.weight", "model.norm.weight"} <= gradients.keys()
    assert not any(gradient.any() for gradient in gradients.values())


def test_the_teacher_is_not_asked_where_none_compares_with_it() -> None:
    models, found = Pair(), batch()
    taken = models.losses([CrossEntropy(), RouterZ(), LoadBalance()])
    assert not taken.needs_teacher
    assert not taken.teacher_signals
    assert not taken.temperatures
    asked: list[Any] = []
    models.teacher.register_forward_hook(lambda *_: asked.append(_))
    taken(LiveTeacher(models.teacher), found)
    assert not asked


def test_what_the_teacher_is_asked_for_is_said_beforehand() -> None:
    models = Pair()
    taken = models.losses(
        [ForwardKL(), ReverseKL(temperature=2.0), CrossEntropy(), BranchMSE(), RouterZ()]
    )
    assert taken.temperatures == {1.0, 2.0}
    assert taken.teacher_signals == {"branch"}


def test_objectives_of_one_kind_are_told_apart_in_logs() -> None:
    models, found = Pair(), batch()
    taken: Objectives = [
        RouterZ(layers=[0]),
        ForwardKL(),
        RouterZ(layers=[2]),
        ForwardKL(temperature=2.0),
    ]
    loss = models.of(taken, found)
    assert list(loss.sums) == ["forward_kl_1", "forward_kl_2", "router_z_1", "router_z_2"]
    both = models.of([RouterZ()], found).sums["router_z"]
    torch.testing.assert_close((loss.sums["router_z_1"] + loss.sums["router_z_2"]) / 2, both)
    alone = models.of([ForwardKL(temperature=2.0)], found).sums["forward_kl"]
    torch.testing.assert_close(loss.sums["forward_kl_2"], alone)


@pytest.mark.parametrize(
    ("objectives", "match"),
    [
        ([], "there is no objective; name one"),
        ([BranchMSE(layers=[1])], r"branch_mse .* decoder layer 1, .* those that do are \[0, 2\]"),
        ([HiddenMSE(layers=[3])], r"hidden_mse .* decoder layer 3, .* are \[0, 1, 2\]"),
        ([HiddenMSE(layers=[])], "hidden_mse names no layer; name some, or all"),
    ],
)
def test_impossible_objectives_are_refused(objectives: Objectives, match: str) -> None:
    with pytest.raises(InputError, match=match):
        Pair().losses(objectives)


def test_router_kl_of_a_layer_of_unknown_fate_is_refused_at_once() -> None:
    models = Pair()
    del models.assignments["model.layers.2.mlp"]
    models.losses([RouterKL(layers=[0])])
    with pytest.raises(InputError, match=r"where the experts of model.layers.2.mlp went"):
        models.losses([RouterKL()])


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_values_at_positions_are_those_of_the_batch(
    chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, found = Pair(), batch()
    objectives = [ForwardKL(), CrossEntropy()]
    name = "lightning_smoe.training.position_values.chunk_size_of"
    monkeypatch.setattr(name, lambda _: chunk_size)
    values = position_values(models.student, LiveTeacher(models.teacher), found, objectives)
    assert not values.values.requires_grad
    assert values.rows.tolist() == [0] * 9 + [1] * 7 + [2] * 11
    for row in range(3):
        part = models.of(objectives, rows_of(found, slice(row, row + 1))).sums
        sums = values.values[:, values.rows == row].sum(1)
        assert sums.tolist() == pytest.approx([v.item() for v in part.values()], rel=1e-4)
