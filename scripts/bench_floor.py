"""What statistics and merging cost beside the arithmetic that they cannot do without."""

import cProfile
import pstats
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_machine
import bench_own
import bench_peers
import torch
from torch import Tensor

from lightning_smoe.compression.recipe import Merge
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.experiment import Experiment
from lightning_smoe.functional.alignment import ByBoth
from lightning_smoe.functional.clustering import Agglomerative
from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.grouping import Clustered
from lightning_smoe.functional.merging import Average, UnionSVD
from lightning_smoe.functional.routed_distance import GatedCosine
from lightning_smoe.functional.router import Slice
from lightning_smoe.functional.saliency import Reap

# Of Qwen1.5-MoE-A2.7B.
EXPERTS, WIDTH, HIDDEN, TOKENS = 60, 1408, 2048, 2048

Row = tuple[str, str, float, float]
Run = Callable[[], object]


def turns(candidates: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median CPU-seconds of each; they take turns, and the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            if number or not rounds:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def routed(calibrate: Run, plain: Run, rounds: int) -> Row:
    """Calibration beside the plain forward pass."""
    found = turns({"plain": plain, "ours": calibrate}, rounds)
    floor = "plain forward pass, 2048 tokens of 316 M parameters"
    return ("calibration on routed tokens", floor, found["ours"], found["plain"])


def every_expert(evidence: Evidence) -> list[Row]:
    """What needs outputs of all experts on all tokens, beside the matrix products alone."""

    def again() -> Evidence:
        # What an evidence has computed it keeps.
        return Evidence(evidence.sums, evidence.sample, evidence.weights, evidence.activate)

    states, weights = evidence.sample.states, evidence.weights
    inner = torch.randn(len(states), WIDTH)

    def products() -> None:
        for up, down in zip(weights.up_proj, weights.down_proj, strict=True):
            for _ in range(2):
                states @ up.T
            inner @ down.T

    found = turns(
        {
            "products": products,
            "sums over pairs of outputs": lambda: again().pairs,
            "sums of outputs": lambda: again().output_sums,
        },
        rounds=0,
    )
    floor = found.pop("products")
    rate = 6 * EXPERTS * WIDTH * HIDDEN * TOKENS / floor / 1e9
    what = f"their matrix products at {rate:.0f} GFLOP/s, 60 x 1408 x 2048, 2048 tokens"
    return [(name, what, seconds, floor) for name, seconds in found.items()]


def union(rounds: int) -> Row:
    """The union of two gate matrices beside the factorisation that defines it."""
    matrices = torch.randn(2, WIDTH, HIDDEN, generator=torch.Generator().manual_seed(0))
    matrices, shares = matrices / HIDDEN**0.5, torch.tensor([0.6, 0.4], dtype=torch.float64)
    rank = WIDTH // 2
    merger = UnionSVD(rank)
    results: dict[str, Tensor] = {}

    def by_definition() -> None:
        u, s, v = torch.linalg.svd(matrices.transpose(0, 1).flatten(1), full_matrices=False)
        parts = v[:rank].unflatten(1, (2, HIDDEN)).transpose(0, 1)
        mean = torch.tensordot(shares.float(), parts, dims=1)
        results["svd"] = (u[:, :rank] * s[:rank]) @ mean

    def ours() -> None:
        results["ours"] = merger._merge(matrices, shares)[0]

    found = turns({"svd": by_definition, "ours": ours}, rounds)
    worst = float((results["svd"] - results["ours"]).abs().max())
    what = f"torch.linalg.svd of [1408, 2 x 2048], rank {rank} (differs by {worst:.0e} at most)"
    return ("union SVD of two gate matrices", what, found["ours"], found["svd"])


def shares() -> Row:
    """Clustering, alignment and writing as a part of a whole run, under a profiler."""
    recipe = Merge(
        Clustered(GatedCosine(), Agglomerative()), Reap(), Average(), ByBoth(), Slice(), refit=None
    )
    with tempfile.TemporaryDirectory() as name:
        model = bench_peers.write_model(Path(name) / "model", layers=8, experts=128)
        text: dict[str, Any] = bench_peers.text_of(bench_peers.TOKENS)
        experiment = Experiment(str(model), Path(name) / "run", recipe=recipe)
        trainer = bench_own.quiet_trainer()
        profile = cProfile.Profile(time.process_time)
        profile.runcall(trainer.compress, experiment, TextDataModule(**text))
    # Any: typeshed does not declare the one attribute that holds the figures.
    figures: Any = pstats.Stats(profile)
    wanted = {
        ("clustering.py", "__call__"),
        ("alignment.py", "__call__"),
        ("saving.py", "save"),
    }
    beside = {("saving.py", "verify")}

    def seconds(names: set[tuple[str, str]]) -> float:
        found = figures.stats.items()
        return sum(v[3] for (file, _, name), v in found if (Path(file).name, name) in names)

    part = seconds(wanted) - seconds(beside)
    what = "the whole run of a merging recipe, 128 -> 64 experts, 316 M parameters"
    return ("clustering, alignment and writing", what, part, figures.total_tt)


def show(rows: list[Row]) -> None:
    """Prints the table, as Markdown."""
    print("\n| what | beside | CPU-seconds | of the other | ratio |\n|---|---|---|---|---|")
    for name, floor, seconds, other in rows:
        print(f"| {name} | {floor} | {seconds:.2f} | {other:.2f} | {seconds / other:.2f} |")
    bench_machine.tell(("torch", "transformers"))


def floor(calibration: tuple[Run, Run], evidence: Evidence, rounds: int) -> None:
    """Measures all, on one thread.

    Args:
        calibration: Calibrates; and the plain forward pass.
        evidence: A layer of random weights of the true size.
        rounds: Rounds that count, for what is quick.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = [routed(*calibration, rounds), union(rounds), *every_expert(evidence), shares()]
    sys.stdout.flush()
    show(rows)
