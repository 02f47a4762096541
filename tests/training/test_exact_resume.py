"""Trainings that are killed and continued end as if nothing had happened, bit for bit."""

import json
import os
import random
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_smoe.training.checkpoint_io import AtomicCheckpointIO
from lightning_smoe.training.recovery import RecoveryModule
from tests.training.kills import Kill, KillWriting, finish, start
from tests.training.students import QUIET, module, text, trainer

pytestmark = QUIET

# Three epochs of eight batches, or six of four where two processes share the text; two a step.
NUM_STEPS = 12
SETTINGS: dict[str, Any] = {"val_check_interval": 6, "accumulate_grad_batches": 2}


def recovery(folder: Path) -> RecoveryModule:
    """A student in whose attention random positions are dropped."""
    found = module(
        folder,
        trainable=("router", "experts"),
        learning_rate=0.003,
        warmup_steps=2,
        checkpoint_every=2,
    )
    for part in found.student.modules():
        if hasattr(part, "attention_dropout"):
            setattr(part, "attention_dropout", 0.3)  # noqa: B010  # mypy knows no such attribute
            part.train()
    return found


def train(folder: Path, callbacks: Sequence[Callback], **options: Any) -> None:
    """Trains, from the newest checkpoint on if there is one, and writes down the end."""
    last = folder / "last.ckpt"
    # What a resumed process draws before it goes on must not count.
    torch.manual_seed(77 if last.exists() else 5)
    student = recovery(folder)
    settings: dict[str, Any] = SETTINGS | options
    engine = trainer(NUM_STEPS, callbacks=[*callbacks], plugins=[AtomicCheckpointIO()], **settings)
    data = text(batch_size=1)
    engine.validate(student, datamodule=data, verbose=False)
    engine.fit(student, datamodule=data, ckpt_path=last if last.exists() else None)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    rank = engine.global_rank
    torch.save([trained, engine.optimizers[0].state_dict()], folder / f"end{rank}.pt")


def run(folder: Path, *callbacks: Callback, **options: Any) -> int | None:
    """Trains in a process of its own; its exit code."""
    (code,) = finish([start(lambda: train(folder, callbacks, **options))])
    return code


def exactly(value: Any) -> Any:
    """The value, with the bytes of a tensor in its place."""
    if isinstance(value, Tensor):
        return str(value.dtype), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: exactly(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [exactly(part) for part in value]
    return value


def end(folder: Path, rank: int = 0) -> list[Any]:
    """Weights, moments and settings of Adam, the best weights and their step, the curve."""
    best = torch.load(folder / "best.ckpt", weights_only=True)
    trained = torch.load(folder / f"end{rank}.pt", weights_only=True)
    curve = json.loads((folder / "curve.json").read_text())
    return [*exactly(trained), exactly(best["state_dict"]), best["global_step"], curve]


def differing(folder: Path, whole: Path, rank: int = 0) -> list[str]:
    """What of the end of a training differs from that of another."""
    names = ("weights", "moments", "best weights", "step of the best", "curve")
    pairs = zip(names, end(folder, rank), end(whole, rank), strict=True)
    return [name for name, found, wanted in pairs if found != wanted]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The end of a training that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == 0
    return folder


def test_a_training_killed_within_a_step_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    # The twelfth batch is the second of its step, in the middle of the second epoch.
    assert run(tmp_path, Kill(11)) == -signal.SIGKILL
    assert run(tmp_path) == 0
    assert differing(tmp_path, whole) == []
    steps = [point["step"] for point in json.loads((tmp_path / "curve.json").read_text())]
    assert steps == [0, 3, 6, 9, 12]


def test_random_numbers_matter_here(whole: Path, tmp_path: Path) -> None:
    class Disturb(Callback):
        def on_train_start(self, *_: Any) -> None:
            torch.rand(1)

    assert run(tmp_path, Disturb()) == 0
    assert {"weights", "moments", "curve"} <= set(differing(tmp_path, whole))


@pytest.mark.slow
def test_it_may_be_killed_again_and_again(whole: Path, tmp_path: Path) -> None:
    # The last of an epoch, the first of the next, the last of all, and the same twice over.
    for batch in (7, 8, 8, 23):
        assert run(tmp_path, Kill(batch)) == -signal.SIGKILL
    assert run(tmp_path) == 0
    assert differing(tmp_path, whole) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "batch"),
    [
        # Validations where epochs end, and writes that are due there.
        ({"val_check_interval": 8, "accumulate_grad_batches": 4}, 8),
        ({"val_check_interval": 1.0, "check_val_every_n_epoch": 1}, 8),
        ({"val_check_interval": 5, "accumulate_grad_batches": 1}, 11),
    ],
)
def test_validations_may_fall_anywhere_between_steps(
    settings: dict[str, Any], batch: int, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert run(whole, **settings) == 0
    assert run(parts, Kill(batch), **settings) == -signal.SIGKILL
    assert run(parts, **settings) == 0
    assert differing(parts, whole) == []


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_loses_nothing(whole: Path, tmp_path: Path) -> None:
    # The last is written at step 2, the best and the last at step 3, the last at step 5, ...
    for number in (2, 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert run(folder, KillWriting(number)) == -signal.SIGKILL
        assert len(list(folder.glob(".*.partial"))) == 1
        assert run(folder, KillWriting(2)) == -signal.SIGKILL
        assert run(folder) == 0
        assert list(folder.glob(".*")) == []
        assert differing(folder, whole) == []


@pytest.mark.slow
def test_it_may_be_killed_at_any_moment(whole: Path, tmp_path: Path) -> None:
    moments = random.Random(3)
    kills = 0
    while not (tmp_path / "end0.pt").exists():
        process = start(lambda: train(tmp_path, []))
        # A whole training takes a second or two: with patience each gets somewhere.
        time.sleep(moments.uniform(0.3, 0.8) * (1 + kills / 5))
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills > 0
    assert differing(tmp_path, whole) == []


def run_two(folder: Path, *callbacks: Callback, dies: Sequence[int] = (0, 1)) -> list[int | None]:
    """Trains in two processes, as torchrun would start them; the exit codes of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def work(rank: int) -> None:
        places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
        sizes = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        os.environ.update({name: str(value) for name, value in (places | sizes).items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="test")
        chosen = callbacks if rank in dies else ()
        train(folder, chosen, devices=2, strategy="ddp", val_check_interval=4)

    return finish([start(lambda rank=rank: work(rank)) for rank in range(2)])  # type: ignore[misc]


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert run_two(whole) == [0, 0]
    # At the end of an epoch, which has four batches here.
    assert run_two(parts, Kill(12)) == [-signal.SIGKILL] * 2
    # The other notices, and ends.
    first, second = run_two(parts, Kill(17), dies=[1])
    assert first not in (0, None)
    assert second == -signal.SIGKILL
    assert run_two(parts, KillWriting(2))[0] == -signal.SIGKILL
    assert run_two(parts) == [0, 0]
    for rank in range(2):
        assert differing(parts, whole, rank) == []
    assert exactly(torch.load(whole / "end0.pt")) == exactly(torch.load(whole / "end1.pt"))
