"""How the cost of pruning grows with tokens, layers and experts: three sizes of each.

Each size is twice the one before. A cost that grows linearly, from whatever start, then grows twice
as much in the second step as in the first; the exponent, which sees the start too, is below 1.
"""

import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import bench_machine
import bench_peers
from bench_peers import Candidate, cost_of, run, write_data, write_model


@dataclass(frozen=True)
class Size:
    """A run.

    Args:
        tokens: Calibration tokens.
        layers: Decoder layers.
        experts: Experts of each.
    """

    tokens: int = 2048
    layers: int = 4
    experts: int = 64


SIZES = {
    "tokens": (2048, 4096, 8192),
    "layers": (2, 4, 8),
    "experts": (64, 128, 256),
}


def growth(rounds: int) -> None:
    """Prints CPU-seconds and peak memory by size, and how they grow."""
    print("\n| what grows | sizes | CPU-seconds | second step / first | exponent | peak, MB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for what, sizes in SIZES.items():
            found = list(costs(what, sizes, Path(name), rounds))
            seconds = [cost[0] for cost in found]
            exponent = math.log(seconds[-1] / seconds[0]) / math.log(sizes[-1] / sizes[0])
            print(
                f"| {what} | {listed(sizes)} | {', '.join(f'{s:.1f}' for s in seconds)} "
                f"| {(seconds[2] - seconds[1]) / (seconds[1] - seconds[0]):.2f} "
                f"| {exponent:.2f} | {listed(int(cost[1]) for cost in found)} |",
                flush=True,
            )
    bench_machine.tell()


def listed(numbers: Iterator[int] | tuple[int, ...]) -> str:
    """Numbers side by side."""
    return ", ".join(map(str, numbers))


def costs(
    what: str, sizes: tuple[int, ...], folder: Path, rounds: int
) -> Iterator[tuple[float, float]]:
    """CPU-seconds and megabytes of a run of each size, medians of rounds in turns."""
    candidates = []
    for size in sizes:
        whole = replace(Size(), **{what: size})
        model = write_model(folder / f"{what}-{size}", layers=whole.layers, experts=whole.experts)
        data = write_data(folder, whole.tokens)
        script = str(bench_peers.SCRIPTS / "bench_own.py")
        candidates.append(Candidate(str(size), [sys.executable, script, str(model), str(data)]))
    found = [[] for _ in sizes]
    for number in range(rounds):
        for candidate, costs_of_size in zip(candidates, found, strict=True):
            target = folder / f"run-{candidate.name}-{number}"
            costs_of_size.append(cost_of(candidate, target))
            run(["rm", "-r", str(target)])
    for size in sizes:
        run(["rm", "-r", str(folder / f"{what}-{size}")])
    for costs_of_size in found:
        seconds, megabytes, _ = bench_machine.medians(costs_of_size)
        yield seconds, megabytes
