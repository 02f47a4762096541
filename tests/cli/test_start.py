"""The program as a process of its own: how it starts, and how it ends when it is stopped."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch

import lightning_smoe
from tests.cli.command import Workplace, snapshot
from tests.cli.trainings import to_train
from tests.training.kills import finish, start

ROOT = Path(__file__).parents[2]
# The package makes its model types known to transformers, which needs no model and no training.
HEAVY = ("lightning", "jsonargparse", "sklearn", "scipy", "matplotlib", "datasets", "lm_eval")
PATIENCE = 120  # seconds that a loaded machine may take for one step


def python(*words: str, within: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=within,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_importing_the_package_imports_nothing_heavy_and_the_program_runs_from_any_folder(
    tmp_path: Path,
) -> None:
    code = (
        "import runpy, sys, lightning_smoe\n"
        f"found = [name for name in {HEAVY} if name in sys.modules]\n"
        "models = [n for n in sys.modules if '.modeling_' in n and 'transformers.models.' in n]\n"
        "print(found + [n for n in models if '.auto.' not in n])\n"
        "runpy.run_module('lightning_smoe', run_name='__main__', alter_sys=True)"
    )
    with python("-c", code, "--help", within=tmp_path) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("[]\nusage: lightning_smoe [-c CONFIG]")
    assert list(tmp_path.iterdir()) == []


def test_the_program_says_its_version(work: Workplace) -> None:
    assert work.run("--version").out == f"lightning_smoe {lightning_smoe.__version__}\n"


@contextmanager
def running(work: Workplace, verb: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A verb in a process of its own."""
    command = ["-m", "lightning_smoe", verb, "--config", "experiment.yaml", *words]
    with python(*command, within=work.folder) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: ForkProcess, happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert process.is_alive(), process.exitcode
        assert time.monotonic() < end
        time.sleep(0.02)


class Stop(logging.Handler):
    """Sends its own process a signal as soon as the first layer is compressed.

    Args:
        sign: The signal.
    """

    def __init__(self, sign: signal.Signals) -> None:
        super().__init__()
        self._sign = sign

    def emit(self, record: logging.LogRecord) -> None:
        """Waits for that layer's line."""
        if record.getMessage().startswith("compress: layer 0"):
            os.kill(os.getpid(), self._sign)


def partial_results(work: Workplace) -> list[str]:
    return [name for name in snapshot(work.out) if name.endswith(".partial")]


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_compression_that_is_stopped_leaves_nothing_half_and_can_be_run_again(
    sign: signal.Signals, work: Workplace
) -> None:
    told = work.folder / "told"

    def stopped() -> None:
        logging.getLogger("lightning_smoe.compression").addHandler(Stop(sign))
        outcome = work.do("compress")
        told.write_text(outcome.err)
        os._exit(outcome.code)

    (code,) = finish([start(stopped)])
    check_end(code, sign, told.read_text() if told.exists() else "")
    assert not (work.out / "compressed").exists()
    if sign != signal.SIGKILL:
        assert partial_results(work) == []
    again = work.done("compress").err
    for step, result in (("calibrate", "statistics.safetensors"), ("plan", "plan.json")):
        assert f"{step}: out/{result} is there already" in again
    assert partial_results(work) == []
    assert work.run("inspect", "out/compressed").out.count(": 6 experts") == 2


def check_end(code: int | None, sign: signal.Signals, err: str) -> None:
    """Checks how a stopped process ended and what it said."""
    if sign != signal.SIGKILL:
        assert code == 130, err
        assert err.splitlines()[-1].startswith("error: interrupted; the same command goes on")
        assert "Traceback" not in err
    else:
        assert code == -signal.SIGKILL, err


@pytest.mark.slow
def test_two_processes_write_what_one_writes(work: Workplace, finished_once: Workplace) -> None:
    words = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2"]
    with running(work, "fit", *words) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert out.count("Report: out/report.md") == 1
    assert err.count("compress: wrote") == 1
    found, alone = (json.loads((w.out / "report.json").read_text()) for w in (work, finished_once))
    plans = [json.loads((w.out / "plan.json").read_text()) for w in (work, finished_once)]
    assert plans[0]["layers"] == plans[1]["layers"]
    for name, model in found["models"].items():
        expected = alone["models"][name]
        assert model["kl"]["mean"] == pytest.approx(expected["kl"]["mean"], rel=0.02)
        assert model["perplexity"]["mean"] == pytest.approx(
            expected["perplexity"]["mean"], rel=1e-3
        )
        assert model["num_parameters"] == expected["num_parameters"]


@pytest.mark.slow
def test_a_training_that_is_stopped_can_be_continued(finished: Workplace) -> None:
    work = to_train(finished)
    last = work.out / "training/last.ckpt"
    told = work.folder / "told"

    def endless() -> None:
        outcome = work.do("fit", "--trainer.max_steps=100000")
        told.write_text(outcome.err)
        os._exit(outcome.code)

    process = start(endless)
    wait_for(process, last.exists)
    process.terminate()
    (code,) = finish([process])
    check_end(code, signal.SIGTERM, told.read_text())
    assert not (work.out / "recovered").exists()
    step = torch.load(last, weights_only=True)["global_step"]
    assert step >= 2
    words = [f"--trainer.max_steps={step + 2}", "--ckpt_path=last"]
    again = work.done("fit", *words).err
    assert "compress: out/compressed is there already" in again
    assert torch.load(last, weights_only=True)["global_step"] == step + 2
    assert (work.out / "recovered/model.safetensors").exists()
    assert partial_results(work) == []
