"""What compressing a checkpoint larger than memory costs, by step: time and peak memory."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
STEPS = ("calibrate", "plan", "compress", "evaluate")


@dataclass(frozen=True)
class Spent:
    """What a step took.

    Args:
        seconds: Wall time, in seconds.
        cpu_seconds: Of all threads.
        peak_gigabytes: Largest resident memory, mapped files and the interpreter included.
    """

    seconds: float
    cpu_seconds: float
    peak_gigabytes: float


def run(checkpoint: Path, recipe: str, num_tokens: int, *, keep: int) -> dict[str, Spent]:
    """Takes a checkpoint through calibrate, plan, compress and evaluate, each in its own process.

    Args:
        checkpoint: The original; the results lie beside it while the benchmark runs.
        recipe: A file of configs/recipe, without its ending.
        num_tokens: Tokens of calibration text, and of test text.
        keep: Experts that each layer keeps.
    """
    spent = {}
    with tempfile.TemporaryDirectory(dir=checkpoint.resolve().parent) as folder:
        experiment = Path(folder) / "experiment.yaml"
        experiment.write_text(yaml.safe_dump(_experiment(checkpoint, recipe, num_tokens, keep)))
        for step in STEPS:
            words = ["-m", "lightning_smoe", step, "--config", str(experiment)]
            spent[step] = _run([sys.executable, *words])
    return spent


def _experiment(checkpoint: Path, recipe: str, num_tokens: int, keep: int) -> dict[str, object]:
    text = {f"{split}_tokens": num_tokens for split in ("calib", "test")}
    model = {
        "checkpoint": str(checkpoint.resolve()),
        "output_dir": "results",
        "keep": keep,
        "recipe": str(ROOT / "configs" / "recipe" / f"{recipe}.yaml"),
        "stream": True,
        "baselines": False,
    }
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False}
    return {"model": model, "data": text, "trainer": trainer}


def _run(command: Sequence[str]) -> Spent:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    folder = Path(command[-1]).parent
    process = subprocess.Popen(command, cwd=folder, env=environment)  # noqa: S603 - our own words
    _, status, used = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} failed")
    seconds = time.monotonic() - start
    return Spent(seconds, used.ru_utime + used.ru_stime, _gigabytes(used))


def _gigabytes(used: resource.struct_rusage) -> float:
    return used.ru_maxrss * 1024 / 1e9


def table(spent: dict[str, Spent]) -> str:
    """The steps as Markdown."""
    lines = ["| step | seconds | CPU-seconds | peak resident GB |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {s.seconds:.0f} | {s.cpu_seconds:.0f} | {s.peak_gigabytes:.2f} |"
        for name, s in spent.items()
    ]
    return "\n".join(lines)
