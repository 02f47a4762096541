"""The program as a process of its own: how it starts, and how it ends when it is stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import lightning_smoe
from tests.cli.command import Workplace, snapshot

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


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, lightning_smoe\n"
        f"found = [name for name in {HEAVY} if name in sys.modules]\n"
        "models = [n for n in sys.modules if '.modeling_' in n and 'transformers.models.' in n]\n"
        "print(found + [n for n in models if '.auto.' not in n])"
    )
    with python("-c", code, within=tmp_path) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (0, "[]\n", "")


@pytest.mark.slow
def test_the_program_runs_from_any_folder(tmp_path: Path) -> None:
    with python("-m", "lightning_smoe", "--help", within=tmp_path) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    assert "usage: lightning_smoe [-c CONFIG]" in out
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


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def trained_work(work: Workplace) -> Workplace:
    """The experiment on the shipped model, whose compression takes seconds."""
    model = ROOT / "checkpoints" / "qwen2moe-tiny-8dom"
    work.write({"model.checkpoint": str(model), "model.keep": 30})
    return work


def partial_results(work: Workplace) -> list[str]:
    return [name for name in snapshot(work.out) if name.endswith(".partial")]


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_compression_that_is_stopped_leaves_nothing_half_and_can_be_run_again(
    sign: signal.Signals, trained_work: Workplace
) -> None:
    work = trained_work
    with running(work, "compress") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("compress: layer 0"):
                break
        process.send_signal(sign)
        out, err = process.communicate(timeout=PATIENCE)
    check_end(process.returncode, sign, out, err)
    assert not (work.out / "compressed").exists()
    if sign != signal.SIGKILL:
        assert partial_results(work) == []
    told = work.done("compress").err
    for step, result in (("calibrate", "statistics.safetensors"), ("plan", "plan.json")):
        assert f"{step}: out/{result} is there already" in told
    assert partial_results(work) == []
    assert work.run("inspect", "out/compressed").out.count(": 30 experts") == 4


def check_end(code: int, sign: signal.Signals, out: str, err: str) -> None:
    """Checks how a stopped process ended and what it said."""
    if sign != signal.SIGKILL:
        assert code == 130, err
        assert err.splitlines()[-1].startswith("error: interrupted; the same command goes on")
        assert "Traceback" not in err
    else:
        assert code == -signal.SIGKILL, (out, err)


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
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_that_is_stopped_can_be_continued_or_run_again(
    sign: signal.Signals, work: Workplace
) -> None:
    last = work.out / "training/last.ckpt"
    with running(work, "fit", "--trainer.max_steps=100000") as process:
        wait_for(process, last.exists)
        process.send_signal(sign)
        out, err = process.communicate(timeout=PATIENCE)
    check_end(process.returncode, sign, out, err)
    assert not (work.out / "recovered").exists()
    step = torch.load(last, weights_only=True)["global_step"]
    assert step >= 2
    words = [f"--trainer.max_steps={step + 2}", "--ckpt_path=last"]
    told = work.done("fit", *words).err
    assert "compress: out/compressed is there already" in told
    assert torch.load(last, weights_only=True)["global_step"] == step + 2
    assert (work.out / "recovered/model.safetensors").exists()
    assert partial_results(work) == []
