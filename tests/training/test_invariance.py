"""A step is one of its rows: however they are padded, packed, accumulated or shared out."""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_smoe.data.text import TextDataModule
from lightning_smoe.training.layer_objectives import HiddenMSE, LoadBalance, RouterZ
from lightning_smoe.training.lora import Lora
from lightning_smoe.training.objectives import CrossEntropy, ForwardKL
from lightning_smoe.training.options import Recovery
from lightning_smoe.training.recovery import RecoveryModule
from lightning_smoe.training.teacher import LiveTeacher
from tests.training.students import CHECKPOINT, QUIET, hashes, pair, trainer

pytestmark = QUIET
NUM_ROWS = 16
PARTS = ("router", "experts")
ON_TOKENS = (ForwardKL(), CrossEntropy(weight=0.1))
ON_LAYERS = (HiddenMSE(weight=0.5), RouterZ(weight=0.01))
SETTINGS: dict[str, Any] = {"trainable": PARTS, "warmup_steps": 0}


def rows(folder: Path, **options: Any) -> TextDataModule:
    """Rows whose prompts and answers are all of different lengths."""
    file = folder / "train" / "rows.jsonl"
    file.parent.mkdir(exist_ok=True)
    lines = [
        {"prompt": f"Sort {n} 3 1: " * (1 + n % 3), "completion": "one and " * (n % 5) + f"{n}"}
        for n in range(NUM_ROWS)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    settings: dict[str, Any] = {"train": str(file), "sequence_length": 64, "pack": False}
    return TextDataModule(tokenizer=CHECKPOINT, **(settings | {"batch_size": 16} | options))


class Written(Callback):
    """Writes losses and gradients of every step, as forked processes keep nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._losses, self._step = folder, list[dict[str, float]](), 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        metrics = trainer.callback_metrics.items()
        self._losses.append({k: v.item() for k, v in metrics if k.startswith("train/")})
        trained = {n: p for n, p in pl_module.named_parameters() if p.requires_grad}
        found = {
            "losses": self._losses,
            "weights": {name: p.detach().clone() for name, p in trained.items()},
            "gradients": {
                name: p.grad.clone() for name, p in trained.items() if p.grad is not None
            },
        }
        torch.save(found, self._folder / f"rank{trainer.global_rank}.pt")


def train(
    folder: Path, data: TextDataModule, recovery: Mapping[str, Any], steps: int = 1, **options: Any
) -> dict[str, Any]:
    """What the last step and the losses of all steps were, on the first process."""
    folder.mkdir(exist_ok=True)
    student, teacher = pair("qwen2_moe")
    chosen = Recovery(**{**SETTINGS, **recovery})
    signals = {s for o in chosen.objectives if isinstance(o, HiddenMSE) for s in o.signals}
    module = RecoveryModule(student, LiveTeacher(teacher, signals=signals), chosen, folder)
    engine = trainer(steps, callbacks=[Written(folder)], limit_val_batches=0, **options)
    engine.fit(module, datamodule=data)
    found: dict[str, Any] = torch.load(folder / "rank0.pt")
    return found


def assert_same_step(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for ours, theirs in zip(found["losses"], wanted["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for name, gradient in wanted["gradients"].items():
        # Sums of float32 differ by the order of their terms.
        scale = float(gradient.abs().max())
        assert scale > 0
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-5 * scale)
    for name, weight in wanted["weights"].items():
        # Adam's first step divides by the gradient's size, which magnifies its rounding.
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5)


def test_a_step_does_not_depend_on_padding(tmp_path: Path) -> None:
    recovery = {"objectives": (*ON_TOKENS, *ON_LAYERS, LoadBalance())}
    short = train(tmp_path / "short", rows(tmp_path), recovery)
    long = train(tmp_path / "long", rows(tmp_path, sequence_length=90), recovery)
    assert_same_step(long, short)


@pytest.mark.parametrize("length", [64, 100])
def test_a_step_does_not_depend_on_how_rows_are_packed(length: int, tmp_path: Path) -> None:
    recovery = {"objectives": (*ON_TOKENS, *ON_LAYERS, LoadBalance())}
    apart = train(tmp_path / "apart", rows(tmp_path), recovery)
    num_windows = len(rows(tmp_path, pack=True, sequence_length=length).windows("train"))
    assert num_windows < NUM_ROWS / 2
    packed = rows(tmp_path, pack=True, sequence_length=length, batch_size=num_windows)
    assert_same_step(train(tmp_path / "packed", packed, recovery), apart)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_step_does_not_depend_on_how_its_rows_are_accumulated(
    batch_size: int, tmp_path: Path
) -> None:
    recovery = {"objectives": (*ON_TOKENS, *ON_LAYERS)}
    whole = train(tmp_path / "whole", rows(tmp_path), recovery)
    parts = train(
        tmp_path / "parts",
        rows(tmp_path, batch_size=batch_size),
        recovery,
        accumulate_grad_batches=NUM_ROWS // batch_size,
    )
    assert_same_step(parts, whole)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_two_processes_have_the_losses_of_one(accumulated: int, tmp_path: Path) -> None:
    # A load is one of a whole batch, which differs where a step has several.
    balance = (LoadBalance(),) if accumulated == 1 else ()
    recovery = {"objectives": (*ON_TOKENS, *ON_LAYERS, *balance), "learning_rate": 1e-4}
    options = {"accumulate_grad_batches": accumulated}
    num_rows = 8 // accumulated
    one = train(tmp_path / "one", rows(tmp_path, batch_size=num_rows), recovery, 6, **options)
    halves = rows(tmp_path, batch_size=num_rows // 2)
    two = train(tmp_path / "two", halves, recovery, 6, devices=2, strategy="ddp_fork", **options)
    assert len(one["losses"]) == 6
    for ours, theirs in zip(two["losses"], one["losses"], strict=True):
        # A divergence is a small difference of large terms.
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    other = torch.load(tmp_path / "two/rank1.pt")
    assert other["losses"] == two["losses"]
    for name, weight in two["weights"].items():
        torch.testing.assert_close(other["weights"][name], weight, rtol=0, atol=0)


def test_the_loss_that_is_logged_is_the_one_by_hand(tmp_path: Path) -> None:
    data = rows(tmp_path)
    # The final norm is within the last hidden state that transformers gives.
    hidden = HiddenMSE(weight=0.5, layers=[0, 1])
    recovery = {"objectives": (ForwardKL(weight=2.0, temperature=2.0), *ON_TOKENS, hidden)}
    (logged,) = train(tmp_path / "run", data, recovery)["losses"]
    student, teacher = pair("qwen2_moe")
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    windows = data.windows("train").tensors()
    for ids, mask, learned in zip(
        *(windows[name] for name in ("input_ids", "attention_mask", "is_answer")), strict=True
    ):
        tokens = ids[mask.bool()]
        with torch.no_grad():
            ours, theirs = (
                model(tokens[None], output_hidden_states=True) for model in (student, teacher)
            )
        for position in range(len(tokens) - 1):
            if learned[position + 1]:
                sums += by_hand(ours, theirs, position, int(tokens[position + 1]))
                count += 1
    means = (sums / count).tolist()
    names = ("forward_kl_1", "forward_kl_2", "cross_entropy", "hidden_mse")
    assert [logged[f"train/{name}"] for name in names] == pytest.approx(means, rel=1e-4)
    total = 2.0 * means[0] + means[1] + 0.1 * means[2] + 0.5 * means[3]
    assert logged["train/loss"] == pytest.approx(total, rel=1e-4)


def by_hand(ours: Any, theirs: Any, position: int, target: int) -> Tensor:
    """Two divergences, the negative log-likelihood and the mean squared error behind layers."""
    logits = [output.logits[0, position].double() for output in (ours, theirs)]
    found = []
    for temperature in (2.0, 1.0):
        q, p = ((x / temperature).log_softmax(-1) for x in logits)
        found.append(temperature**2 * float((p.exp() * (p - q)).sum()))
    found.append(-float(logits[0].log_softmax(-1)[target]))
    states = zip(ours.hidden_states[1:3], theirs.hidden_states[1:3], strict=True)
    errors = [float((a[0, position] - b[0, position]).square().mean()) for a, b in states]
    found.append(sum(errors) / len(errors))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    ("recovery", "pattern"),
    [
        ({"trainable": [r"layers\.2\.mlp\.experts\.down"]}, r"layers\.2\.mlp\.experts\.down_proj"),
        ({"trainable": {"router": 0.01, "norm": 0.001}}, r"mlp\.gate\.weight|layernorm\.weight"),
        ({"trainable": (), "lora": Lora(rank=2)}, r"\.lora_"),
        (
            {"trainable": ["router"], "lora": Lora(rank=2, targets=["attention"])},
            r"mlp\.gate\.weight|self_attn.*\.lora_",
        ),
    ],
)
def test_only_what_is_named_changes_and_the_teacher_is_nowhere(
    recovery: dict[str, Any], pattern: str, tmp_path: Path
) -> None:
    student, teacher = pair("qwen2_moe")
    original = copy.deepcopy(teacher)
    chosen = Recovery(objectives=(ForwardKL(), HiddenMSE()), warmup_steps=0, **recovery)
    module = RecoveryModule(
        student, LiveTeacher(teacher, signals=["hidden"]), chosen, tmp_path / "run"
    )
    before = hashes(module.student)
    engine = trainer(4, val_check_interval=2, limit_val_batches=0)
    engine.fit(module, datamodule=rows(tmp_path, batch_size=4))
    after = hashes(module.student)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if re.search(pattern, name)}
    assert hashes(teacher) == hashes(original)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    engine.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {name.removeprefix("student.") for name in checkpoint["state_dict"]} == changed
    assert not any("teacher" in name for name, _ in module.named_parameters())
