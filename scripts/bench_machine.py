"""What stands beside every table: the machine, the versions, the day, and medians of rounds."""

import datetime
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def tell(packages: Sequence[str] = ("torch", "transformers"), other: Path | None = None) -> None:
    """Prints one line about the machine.

    Args:
        packages: Packages of this environment whose versions are told.
        other: A second environment, whose llm-compressor, torch and transformers are told.
    """
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.*)", info)
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    gigabytes = int(memory.group(1)) * 1024 / 1e9 if memory else float("nan")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    line = (
        f"\n{model.group(1) if model else 'unknown processor'}, {os.cpu_count()} cores, "
        f"{gigabytes:.0f} GB; Python {sys.version.split()[0]}, {versions}; one thread a process; "
        f"{datetime.datetime.now(datetime.UTC).date()}; load average {os.getloadavg()[0]:.1f}"
    )
    if other is not None:
        names = ("llmcompressor", "torch", "transformers")
        code = f"from importlib.metadata import version; print(*map(version, {names!r}))"
        command = [str(other / "bin" / "python"), "-c", code]
        told = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - the user's own environment
        found = told.stdout.split()
        line += "; theirs: " + ", ".join(f"{n} {v}" for n, v in zip(names, found, strict=True))
    print(line)


def medians(costs: Sequence[dict[str, Any]]) -> tuple[float, float, str]:
    """Median CPU-seconds and megabytes, and where the seconds of the median round went."""
    ordered = sorted(costs, key=lambda cost: float(cost["seconds"]))
    middle = ordered[len(ordered) // 2]
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in middle["parts"].items())
    seconds = statistics.median(float(cost["seconds"]) for cost in costs)
    return seconds, statistics.median(float(cost["megabytes"]) for cost in costs), parts
