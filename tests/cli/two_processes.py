"""The command line in two processes that train together; forked, so nothing is imported anew."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

from tests.cli.command import Outcome, Workplace
from tests.training.kills import finish, start

SLICES = (
    "--trainer.strategy={class_path: lightning.pytorch.strategies.ModelParallelStrategy, init_args:"
    " {data_parallel_size: 2, tensor_parallel_size: 1, save_distributed_checkpoint: false}}"
)
# The same four sequences at a step as on one process.
TWO = ("--trainer.devices=2", "--data.batch_size=2")


def do_in_two(work: Workplace, verb: str, *words: str) -> list[Outcome]:
    """Runs a verb on the experiment file in two processes, with further options."""
    return in_two(work.folder, lambda: work.do(verb, *TWO, *words))


def in_two(folder: Path, command: Callable[[], Outcome]) -> list[Outcome]:
    """Runs a command in two processes, as torchrun would start them.

    Args:
        folder: Where what they told is left.
        command: The command; none comes to an outcome that is killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = [folder / f"told{rank}" for rank in range(2)]

    def one(rank: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2}
        names |= {"LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="test")
        told[rank].unlink(missing_ok=True)
        outcome = command()
        told[rank].write_text(outcome.err)
        os._exit(outcome.code)

    codes = finish([start(lambda rank=rank: one(rank)) for rank in range(2)])  # type: ignore[misc]
    texts = [path.read_text() if path.exists() else "" for path in told]
    return [Outcome(-1 if c is None else c, "", t) for c, t in zip(codes, texts, strict=True)]
