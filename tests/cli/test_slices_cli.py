"""Training in two processes, which share models out or not, and going on after a kill."""

import json
import signal
from collections.abc import Sequence

import pytest

from tests.cli.command import Workplace, hash_of
from tests.cli.trainings import distance, held_out, put_aside, to_train
from tests.cli.two_processes import SLICES, TWO, do_in_two
from tests.training.kills import finish, start

TRAINED = "--model.recovery.trainable=[router,experts]"
SHARDED = "--model.recovery.teacher.placement=sharded"
LORA = ("--model.recovery.trainable=[]", "--model.recovery.lora={rank: 2, learning_rate: 0.003}")


def recovered(work: Workplace, name: str, *words: str) -> None:
    """Trains in two processes, and puts the result aside."""
    first, second = do_in_two(work, "fit", *words)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.err.count("fit: wrote out/recovered") == 1
    put_aside(work, name)


def kill(batch: int) -> str:
    """The option that kills each process as a batch starts."""
    path = "tests.training.kills.Kill"
    return f"--trainer.callbacks=[{{class_path: {path}, init_args: {{batch: {batch}}}}}]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "slices"),
    [
        ([TRAINED], [SLICES, SHARDED]),
        (LORA, [SLICES]),
    ],
)
def test_shared_out_or_whole_the_result_is_the_same(
    words: Sequence[str], slices: Sequence[str], finished: Workplace
) -> None:
    work = to_train(finished)
    # Within rounding of Adam's first steps, two processes are one.
    work.done("fit", *words)
    alone = put_aside(work, "alone")
    recovered(work, "shared", *slices, *words)
    assert distance(work.out / "shared", work.out / "compressed") > 5e-4
    assert distance(work.out / "shared", alone) < 1e-5


@pytest.mark.slow
def test_a_training_in_slices_that_is_killed_goes_on(finished: Workplace) -> None:
    work = to_train(finished)
    words = (SLICES, TRAINED, "--model.recovery.checkpoint_every=1")
    recovered(work, "whole", *words)

    first, second = do_in_two(work, "fit", *words, kill(batch=3))
    assert (first.code, second.code) == (-signal.SIGKILL, -signal.SIGKILL)
    assert not (work.out / "recovered").exists()
    told = do_in_two(work, "fit", *words)[0]
    assert told.code == 0, told.err
    assert "training goes on from out/training/last.ckpt" in told.err
    paths = [work.out / name / "model.safetensors" for name in ("whole", "recovered")]
    assert hash_of(paths[0]) == hash_of(paths[1])
    report = json.loads((work.out / "report.json").read_text())["models"]
    assert report["recovered"]["kl"]["mean"] < report["compressed"]["kl"]["mean"]


def refused(work: Workplace, match: str, verb: str, *words: str) -> None:
    """Expects a refusal, in a process of its own: Lightning kills one whose helpers fail."""

    def expect() -> None:
        work.refused(match, verb, SLICES, *TWO, *words)

    assert finish([start(expect)]) == [0], match


@pytest.mark.slow
def test_what_slices_cannot_do_is_refused(work: Workplace, finished: Workplace) -> None:
    refused(work, r"no out/compressed, .*run compress first", "fit")
    for verb in ("compress", "evaluate"):
        match = r"strategy=ModelParallelStrategy shares out single weights, .* use ddp"
        refused(work, match, verb)
    prefix = "--trainer.strategy.init_args."
    for change in (
        "tensor_parallel_size=2",
        "save_distributed_checkpoint=true",
        "data_parallel_size=1",
        "data_parallel_size=auto",
    ):
        match = r"set its init_args to {data_parallel_size: 2, tensor_parallel_size: 1"
        refused(finished, match, "fit", f"{prefix}{change}")
    cache = "--model.recovery.teacher.cache={top_k: 8}"
    refused(finished, r"out/teacher lacks answers, .* cache` first", "fit", cache)


def test_steps_before_training_are_not_run_in_slices(finished: Workplace) -> None:
    first, _ = do_in_two(finished, "fit", SLICES, "--model.overwrite=true")
    assert first.code == 2
    assert "model.overwrite would make out/compressed anew" in first.err


def test_a_program_that_is_killed_ends_bit_for_bit_as_if_it_had_not_been(
    finished: Workplace,
) -> None:
    work = to_train(finished)
    words = [TRAINED, "--trainer.max_steps=6", "--trainer.val_check_interval=4"]
    words += ["--model.recovery.checkpoint_every=1", "--trainer.accumulate_grad_batches=2"]
    work.done("fit", *words)
    curve = held_out(work)
    whole = put_aside(work, "whole")
    # Within a step, and behind a validation.
    killed = finish([start(lambda: work.done("fit", *words, kill(batch=7)))])
    assert killed == [-signal.SIGKILL]
    assert not (work.out / "recovered").exists()
    told = work.done("fit", *words).err
    assert "compress: out/compressed is there already" in told
    assert "training goes on from out/training/last.ckpt" in told
    name = "model.safetensors"
    assert hash_of(work.out / "recovered" / name) == hash_of(whole / name)
    assert held_out(work) == curve
