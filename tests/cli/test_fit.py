"""What becomes of the trained student: the best one is kept, and a bad one is not."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # no stubs
    EventAccumulator,
)
from transformers import PreTrainedModel

from lightning_smoe.results import save_result
from tests.cli.command import Workplace, check_refusal, snapshot

# No models beside the results, which have tests of their own.
BARE = "--model.baselines=false"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_an_early_student_is_kept_where_later_ones_are_worse(untrained: Workplace) -> None:
    work = untrained
    # The steps grow and grow: the first help, the last hurt.
    work.done(
        "fit",
        "--model.recovery.trainable=[router,experts]",
        "--model.recovery.learning_rate=0.03",
        "--model.recovery.warmup_steps=30",
        "--trainer.max_steps=12",
        "--trainer.val_check_interval=1",
        "--trainer.logger=true",
        BARE,
    )
    events = EventAccumulator(str(work.folder / "logs/out/version_0")).Reload()
    start, *validated = [event.value for event in events.Scalars("valid/kl")]
    best = validated.index(min(validated))
    assert best < len(validated) - 1
    assert validated[best] < start
    checkpoint = torch.load(work.out / "training/best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == best + 1
    name = "model.layers.0.mlp.gate.weight"
    kept = weights(work.out / "recovered")[name]
    torch.testing.assert_close(kept, checkpoint["state_dict"][f"student.{name}"], rtol=0, atol=0)


def test_training_that_makes_it_worse_keeps_the_compressed_weights(untrained: Workplace) -> None:
    work = untrained
    # So much worse that the perplexity is beyond the largest number.
    words = ["--model.recovery.trainable=[all]", "--model.recovery.learning_rate=100"]
    told = work.done("fit", BARE, *words).err
    assert "training did not lower the validation KL" in told
    assert "recovered/ holds the compressed model as it was" in told
    for name, tensor in weights(work.out / "compressed").items():
        recovered = weights(work.out / "recovered")[name]
        torch.testing.assert_close(recovered, tensor, rtol=0, atol=0)
    card = (work.out / "recovered/README.md").read_text()
    assert "Training against the original did not help" in card
    models = json.loads((work.out / "report.json").read_text())["models"]
    assert models["recovered"]["kl"] == models["compressed"]["kl"]


def test_a_loss_that_is_no_number_ends_with_one_message(untrained: Workplace) -> None:
    work = untrained
    outcome = work.do(
        "fit", "--model.recovery.trainable=[all]", "--model.recovery.learning_rate=1e30"
    )
    match = r"the loss is (nan|inf) at step 1 \(documents \[\d+.*lower model\.recovery\.learning"
    check_refusal(outcome, match)
    assert not (work.out / "recovered").exists()
    assert (work.out / "compressed").exists()


@pytest.mark.slow
def test_a_longer_training_continues_from_the_last_checkpoint(untrained: Workplace) -> None:
    work = untrained
    told = work.done("fit", BARE, "--ckpt_path=last").err
    assert "there is no out/training/last.ckpt to continue" in told
    last = work.out / "training/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    before = snapshot(work.out / "recovered")
    shutil.rmtree(work.out / "recovered")
    assert "training goes on from out/training/last.ckpt" in work.done("fit", BARE).err
    assert snapshot(work.out / "recovered") == before
    match = r"recovered holds the result of another run \(different: trainer\)"
    check_refusal(work.do("fit", BARE, "--trainer.max_steps=6"), match)
    work.done("fit", BARE, "--trainer.max_steps=6", "--ckpt_path=last")
    assert torch.load(last, weights_only=True)["global_step"] == 6
    assert "forward_kl, 6 steps" in (work.out / "recovered/README.md").read_text()


def test_a_checkpoint_of_other_trainable_parts_is_refused(finished: Workplace) -> None:
    shutil.rmtree(finished.out / "recovered")
    outcome = finished.do("fit", "--model.recovery.trainable=[experts]", "--ckpt_path=last")
    check_refusal(outcome, r"trained other parameters .* same model\.recovery\.trainable")
    assert not (finished.out / "recovered").exists()
    assert (finished.out / "training/last.ckpt").exists()


def test_only_fit_logs_and_it_logs_under_the_name_of_the_run(finished_once: Workplace) -> None:
    assert [path.name for path in (finished_once.folder / "logs").iterdir()] == ["out"]
    assert list((finished_once.folder / "logs/out/version_0").glob("events.out.tfevents.*"))


def test_what_cannot_be_trained_is_refused_before_any_work(work: Workplace) -> None:
    for words, match in (
        (["--ckpt_path=none.ckpt"], r"none\.ckpt"),
        (["--trainer.val_check_interval=0"], r"val_check_interval=0 never validates"),
        (["--trainer.max_steps=-1"], r"nothing ends training; set trainer\.max_steps"),
        (
            ["--trainer.val_check_interval=5"],
            r"max_steps=4 ends training before .* 5 batches; .*val_check",
        ),
        (["--trainer.max_steps=0"], r"max_steps=0 ends training"),
        (["--data.batch_size=400"], r"the train split gives \d+ sequences but one step takes 400"),
    ):
        work.refused(match, "fit", *words)


def test_a_part_that_is_not_there_is_refused_before_any_work(
    new_workplace: Callable[[Path, str], Workplace], tmp_path: Path
) -> None:
    work = new_workplace(tmp_path / "work", "qwen3_moe")
    match = "trainable names shared, which the model does not have"
    work.refused(match, "fit", "--model.recovery.trainable=[router, shared]")


@pytest.mark.slow
def test_weights_in_bfloat16_are_trained_in_mixed_precision_only(work: Workplace) -> None:
    work.write({"model.dtype": "bfloat16"})
    work.refused(r"trained parts are held in float32; set trainer\.precision to bf16-mixed", "fit")
    work.done("fit", "--trainer.precision=bf16-mixed", BARE)
    models = json.loads((work.out / "report.json").read_text())["models"]
    assert models["recovered"]["kl"]["mean"] <= 1.5 * models["compressed"]["kl"]["mean"]
    stored = weights(work.out / "recovered")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def in_memory() -> int:
    """Models with weights, and optimizers, that are alive."""
    gc.collect()
    kinds = (PreTrainedModel, torch.optim.Optimizer)
    # By type: to ask some objects for their class gives a warning.
    found: list[Any] = [o for o in gc.get_objects() if issubclass(type(o), kinds)]
    outlines = [o for o in found if isinstance(o, PreTrainedModel) and o.device.type == "meta"]
    return len(found) - len(outlines)


def test_student_teacher_and_optimizer_are_let_go_before_results_are_written(
    untrained: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []

    def look(work: Any, model: PreTrainedModel, path: Path, **rest: Any) -> None:
        if path.name == "recovered":
            alive.append(in_memory())
        save_result(work, model, path, **rest)

    monkeypatch.setattr("lightning_smoe.recover.save_result", look)
    before = in_memory()
    untrained.done("fit", BARE)
    # A model and its base, which is one too; what other tests left may have gone.
    assert alive[0] <= before + 2


def test_a_training_with_other_settings_that_was_cut_off_is_not_thrown_away(
    finished: Workplace,
) -> None:
    shutil.rmtree(finished.out / "recovered")
    before = snapshot(finished.out / "training")
    faster = "--model.recovery.learning_rate=0.002"
    match = r"training holds a training with other settings .*different: recovery.*--ckpt_path last"
    check_refusal(finished.do("fit", faster), match)
    assert snapshot(finished.out / "training") == before
    # What only decides memory does not count.
    told = finished.done("fit", "--model.recovery.gradient_checkpointing=true").err
    assert "training goes on from out/training/last.ckpt" in told


def test_a_learning_rate_may_change_where_a_training_goes_on(finished: Workplace) -> None:
    words = ("--trainer.max_steps=6", "--ckpt_path=last", "--model.recovery.learning_rate=1e-5")
    finished.done("fit", *words)
    last = torch.load(finished.out / "training/last.ckpt", weights_only=True)
    assert last["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 1e-5
    assert last["lr_schedulers"][0]["base_lrs"] == [1e-5]


def test_steps_behind_the_last_validation_are_refused(work: Workplace) -> None:
    match = r"max_steps=5 leaves 1 batches behind the last validation.* a multiple of 2"
    work.refused(match, "fit", "--trainer.max_steps=5")


def test_a_layer_that_an_objective_cannot_be_taken_at_is_refused_before_any_work(
    work: Workplace,
) -> None:
    path = "lightning_smoe.training.layer_objectives.HiddenMSE"
    wrong = f"--model.recovery.objectives=[{{class_path: {path}, init_args: {{layers: [9]}}}}]"
    work.refused(r"hidden_mse is to be taken at decoder layer 9", "fit", wrong)
