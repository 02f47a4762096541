"""Objectives, parts and how the teacher is held, as an experiment file names them."""

from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # no stubs
    EventAccumulator,
)

from tests.cli.command import Workplace, check_refusal
from tests.cli.trainings import SHORT, changed, distance, held_out, put_aside, to_train

OBJECTIVES = [
    {
        "class_path": f"lightning_smoe.training.{module}",
        "init_args": init,
    }
    for module, init in (
        ("objectives.ForwardKL", {}),
        ("objectives.ForwardKL", {"temperature": 2.0, "weight": 0.5}),
        ("layer_objectives.LoadBalance", {"weight": 0.1}),
        ("layer_objectives.HiddenMSE", {"layers": [0, 2]}),
    )
]
NAMES = {"forward_kl_1": 1.0, "forward_kl_2": 0.5, "load_balance": 0.1, "hidden_mse": 1.0}


def train(work: Workplace, *words: str, **recovery: Any) -> str:
    """Trains with these settings of model.recovery in the experiment file."""
    work.write({**SHORT, **{f"model.recovery.{name}": v for name, v in recovery.items()}})
    return work.done("fit", *words).err


def scalars(work: Workplace) -> dict[str, list[float]]:
    """What TensorBoard shows of the newest run."""
    version = max((work.folder / "logs/out").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    events = EventAccumulator(str(version)).Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_weighted_list_of_objectives_is_logged_by_name_and_in_sum(finished: Workplace) -> None:
    work = to_train(finished)
    logging = ("--trainer.logger=true", "--trainer.log_every_n_steps=1")
    train(work, *logging, objectives=OBJECTIVES, trainable=["router", "experts"])
    logged = scalars(work)
    for step in range(4):
        total = sum(weight * logged[f"train/{name}"][step] for name, weight in NAMES.items())
        assert logged["train/loss"][step] == pytest.approx(total, rel=1e-5)
    assert all(value > 0 for name in NAMES for value in logged[f"train/{name}"])
    assert {"valid/kl/arith", "valid/perplexity/lit", "tokens/s"} <= logged.keys()
    card = (work.out / "recovered/README.md").read_text()
    assert "on forward_kl_1, forward_kl_2, load_balance, hidden_mse" in card


def test_parts_have_learning_rates_of_their_own(finished: Workplace) -> None:
    work = to_train(finished)
    logging = ("--trainer.logger=true", "--trainer.log_every_n_steps=1")
    parts = {"router": 0.001, r"layers\.2\.mlp\.shared_expert\.": 0.0005}
    told = train(work, *logging, trainable=parts, warmup_steps=0)
    assert "fit: router is trained, 384 parameters" in told
    assert r"fit: layers\.2\.mlp\.shared_expert\. is trained, 3,840 parameters" in told
    found = {tag: v for tag, v in scalars(work).items() if "learning_rate" in tag}
    rates = {0.001, 0.0005}
    assert {round(values[0], 9) for values in found.values()} == rates
    gates = {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 2)}
    shared = {f"model.layers.2.mlp.shared_expert.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert changed(work) == gates | shared
    again = work.run("fit", "--config=out/config.yaml")
    assert again.code == 0, again.err
    assert "recovered is there already, made from the same inputs" in again.err


@pytest.mark.slow
def test_activation_checkpoints_change_no_weight(finished: Workplace) -> None:
    work = to_train(finished)
    train(work, trainable=["router", "experts"], objectives=OBJECTIVES)
    put_aside(work, "kept")
    train(
        work,
        "--model.recovery.gradient_checkpointing=true",
        trainable=["router", "experts"],
        objectives=OBJECTIVES,
    )
    assert distance(work.out / "recovered", work.out / "compressed") > 5e-4
    assert distance(work.out / "recovered", work.out / "kept") < 1e-6


@pytest.mark.slow
def test_training_stops_where_nothing_improves(finished: Workplace) -> None:
    work = to_train(finished)
    # From the first step on only worse.
    words = ("--trainer.max_steps=40", "--trainer.val_check_interval=1")
    train(work, *words, trainable=["all"], learning_rate=1.0, warmup_steps=0, patience=3)
    last = torch.load(work.out / "training/last.ckpt", weights_only=True)["global_step"]
    best = held_out(work)[1:].index(min(held_out(work)[1:])) + 1
    assert last == best + 3 < 40


@pytest.mark.slow
def test_a_teacher_may_rest_in_main_memory_or_be_rounded(finished: Workplace) -> None:
    work = to_train(finished)
    train(work, trainable=["router", "experts"])
    kept = put_aside(work, "kept")
    train(work, trainable=["router", "experts"], teacher={"placement": "offload"})
    assert distance(work.out / "recovered", kept) == 0
    put_aside(work, "offloaded")
    train(work, trainable=["router", "experts"], teacher={"quantize": "int8"})
    assert 0 < distance(work.out / "recovered", kept) < 2e-3


def test_a_sharded_teacher_on_one_process_is_refused(work: Workplace) -> None:
    placed = "--model.recovery.teacher.placement=sharded"
    work.refused(r"sharded needs several processes; use device, or offload", "fit", placed)
    rounded = "--model.recovery.teacher.quantize=int8"
    outcome = work.do("fit", placed, rounded)
    check_refusal(outcome, r"a sharded teacher cannot be quantised")
