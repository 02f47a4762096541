"""What is trained, on which loss, and what is left alone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.evaluation.perplexity import EvaluationModule
from lightning_smoe.training.objectives import ForwardKL
from lightning_smoe.training.options import Recovery
from lightning_smoe.training.recovery import RecoveryModule
from lightning_smoe.training.teacher import LiveTeacher
from tests.training.students import QUIET, fit, hashes, module, pair, select, text, trainer

pytestmark = QUIET
DOMAINS = ("arith", "lit")
ROUTER = ("mlp.gate.weight",)
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SHARED = (
    "mlp.shared_expert.gate_proj.weight",
    "mlp.shared_expert.up_proj.weight",
    "mlp.shared_expert.down_proj.weight",
    "mlp.shared_expert_gate.weight",
)


@torch.no_grad()
def looped_loss(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], temperature: float
) -> float:
    """Mean of T^2 KL(softmax(teacher / T) || softmax(student / T)) where a token follows."""
    divergences: list[float] = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        tokens = ids[mask.bool()][None]
        wanted = (teacher(tokens).logits[0, :-1].double() / temperature).log_softmax(-1)
        found = (student(tokens).logits[0, :-1].double() / temperature).log_softmax(-1)
        for p, q in zip(wanted, found, strict=True):
            divergences.append(temperature**2 * sum((p.exp() * (p - q)).tolist()))
    return sum(divergences) / len(divergences)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_the_mean_divergence_over_the_tokens_of_the_batch(
    temperature: float, packed: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {} if packed else short_documents(tmp_path)
    batch = next(iter(text(**options).train_dataloader()))
    assert bool(batch["attention_mask"].all()) == packed
    expected = looped_loss(*pair("qwen2_moe"), batch, temperature)
    recovery = module(tmp_path, objectives=(ForwardKL(temperature=temperature),))
    _, note = fit(recovery, text(**options), 1, limit_val_batches=0)
    # A divergence in float32 is off by 1e-7, before it is multiplied by the squared temperature.
    assert note.losses == [pytest.approx(expected, abs=5e-7 * temperature**2)]


def short_documents(folder: Path) -> dict[str, Any]:
    for domain in ("arith", "lit"):
        (folder / "train").mkdir(exist_ok=True)
        documents = "a b\x1ethe house by the sea\x1ethe end\x1eso it was, then, he said"
        (folder / "train" / f"{domain}.txt").write_text(documents)
    return {"train": str(folder / "train"), "pack": False, "batch_size": 4, "train_tokens": None}


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (("router",), ROUTER),
        (("experts",), EXPERTS),
        (("shared",), SHARED),
        (("router", "shared"), ROUTER + SHARED),
        (("all",), None),
        (("router+shared",), ROUTER + SHARED),
        (("router", "all"), None),
    ],
)
def test_only_the_named_parts_change_and_all_of_them_do(
    parts: tuple[Any, ...], names: tuple[str, ...] | None, tmp_path: Path
) -> None:
    recovery = module(tmp_path, trainable=parts)
    before = hashes(recovery.student)
    buffers = {name: tensor.clone() for name, tensor in recovery.student.named_buffers()}
    fit(recovery, text(), 2)
    after = hashes(recovery.student)
    changed = {name for name in before if before[name] != after[name]}
    expected = {name for name in before if names is None or name.endswith(names)}
    assert changed == expected
    for name, tensor in recovery.student.named_buffers():
        torch.testing.assert_close(tensor, buffers[name], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_router_and_experts_change_in_other_families_too(family: str, tmp_path: Path) -> None:
    recovery = module(tmp_path, family, trainable=("router", "experts"))
    before = hashes(recovery.student)
    fit(recovery, text(), 2)
    after = hashes(recovery.student)
    changed = {name for name in before if before[name] != after[name]}
    wanted = {name for name, p in recovery.student.named_parameters() if p.requires_grad}
    assert changed == wanted
    assert all(".mlp." in name or ".block_sparse_moe." in name for name in wanted)
    assert recovery.trainable_counts.keys() == {"router", "experts"}


def test_counts_say_how_many_parameters_are_trained() -> None:
    student, _ = pair("qwen2_moe")
    total = sum(p.numel() for p in student.parameters())
    assert select(student, ["router"]) == {"router": 2 * 8 * 32}
    counts = select(student, ["router", "experts", "shared"])
    assert counts == {
        "router": 2 * 8 * 32,
        "experts": 2 * 8 * 3 * 24 * 32,
        "shared": 2 * (3 * 40 * 32 + 32),
    }
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == sum(counts.values())
    assert select(student, ["all"]) == {"all": total}


def test_a_part_that_is_not_there_is_refused() -> None:
    student, _ = pair("qwen3_moe")
    with pytest.raises(InputError, match="names shared, which the model does not have"):
        select(student, ["router", "shared"])


def test_the_teacher_never_changes_and_gets_no_gradient(tmp_path: Path) -> None:
    student, teacher = pair("qwen2_moe")
    teacher.train()
    before = hashes(teacher)
    recovery = RecoveryModule(
        student, LiveTeacher(teacher), Recovery(trainable=("all",)), tmp_path, domains=DOMAINS
    )
    fit(recovery, text(), 3)
    assert hashes(teacher) == before
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert next(teacher.parameters()).device.type == "cpu"


def test_checkpoints_hold_trainable_parameters_and_no_teacher(tmp_path: Path) -> None:
    recovery = module(tmp_path, trainable=("router", "experts"))
    fit(recovery, text(), 2)
    names = sorted(path.name for path in tmp_path.glob("*"))
    assert names == ["best.ckpt", "curve.json", "last.ckpt"]
    expected = {
        f"student.model.layers.{layer}.{name}" for layer in (0, 2) for name in ROUTER + EXPERTS
    }
    trained = sum(recovery.trainable_counts.values())
    for path in tmp_path.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["state_dict"].keys() == expected
        (optimizer,) = checkpoint["optimizer_states"]
        assert len(optimizer["state"]) == len(expected)
        # Weights and the two moments of Adam, four bytes each; the rest is a few settings.
        assert 12 * trained < path.stat().st_size < 12 * trained + 40_000


def test_divergence_falls_when_one_batch_is_learned(tmp_path: Path) -> None:
    recovery = module(tmp_path, trainable=("router", "experts"), learning_rate=0.003)
    data = text(train_tokens=2 * 32, valid_tokens=2 * 32)
    _, note = fit(recovery, data, 40, limit_val_batches=0)
    assert note.losses[-1] < 0.3 * note.losses[0]


def test_validation_measures_what_the_evaluation_measures(tmp_path: Path) -> None:
    recovery = module(tmp_path, domains=("lit",))
    data = text(domains=["lit"], valid_tokens=5 * 32)
    engine = trainer(1)
    (found,) = engine.validate(recovery, datamodule=data, verbose=False)
    student, teacher = pair("qwen2_moe")
    judge = EvaluationModule(student, teacher, ("lit",))
    engine.test(judge, dataloaders=data.val_dataloader(), verbose=False)
    assert found["valid/kl"] == pytest.approx(judge.quality.mean_kl, rel=1e-6)
    assert found["valid/perplexity"] == pytest.approx(judge.quality.perplexity, rel=1e-6)


class Poison(Callback):
    """Makes a weight a number that is none before the given step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            self.documents = sorted(set(batch["document"].flatten().tolist()))
            next(pl_module.parameters()).data.fill_(math.nan)


def test_a_loss_that_is_no_number_stops_with_step_and_documents(tmp_path: Path) -> None:
    poison = Poison(2)
    with pytest.raises(InputError, match=r"the loss is nan at step 2 \(documents \[") as error:
        fit(module(tmp_path), text(), 4, callbacks=[poison])
    assert f"(documents {poison.documents}); lower model.recovery" in str(error.value)


def test_the_last_checkpoint_from_before_a_loss_that_is_no_number_is_named(tmp_path: Path) -> None:
    for folder, step, match in (
        ("first", 1, r"there is no checkpoint$"),
        ("next", 2, r"there is no checkpoint from before$"),
        ("later", 3, rf"the last good checkpoint is {tmp_path}/later/\w+\.ckpt, of step 2$"),
    ):
        with pytest.raises(InputError, match=match):
            fit(module(tmp_path / folder), text(), 4, callbacks=[Poison(step)])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"trainable": ()}, "trainable is empty; name router"),
        ({"trainable": ("(",)}, "no regular expression"),
        ({"objectives": ()}, "objectives is empty; name one, such as ForwardKL"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be above 0"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 must be 1 or more"),
        ({"patience": 0}, "patience=0 must be 1 or more"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be 0 or more"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Recovery(**options)
