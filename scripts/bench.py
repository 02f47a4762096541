"""Times parts of the project beside their floor, in one run: ratios hold on a noisy machine.

    python scripts/bench.py calibration
    python scripts/bench.py plan --rounds 1
    python scripts/bench.py pairs --rounds 1
    python scripts/bench.py recovery --rounds 3
    python scripts/bench.py recovery-memory
    python scripts/bench.py peers --environment venv_llmc --rounds 1
    python scripts/bench.py floor --rounds 3
    python scripts/bench.py growth --rounds 1
    python scripts/bench.py stream --checkpoint /tmp/qwen --recipe stock

`peers` needs a second environment with llm-compressor: `python -m venv venv_llmc`, then
`venv_llmc/bin/pip install llmcompressor==0.14.0.1`. Each of its candidates, and each size of
`growth`, runs in a process of its own on one thread; the start of the process does not count.

`stream` needs a checkpoint, such as `scripts/make_checkpoint.py qwen1.5-moe-a2.7b /tmp/qwen`
writes, and half as much room beside it: each step runs in a process of its own, whose start counts.

The unit is CPU-seconds of this process (all threads), the median over rounds in which the
candidates take turns.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_floor
import bench_growth
import bench_peers
import bench_recovery
import bench_stream
import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from lightning_smoe.calibration.module import CalibrationModule, ExpertStatistics
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.functional.evidence import Evidence, TokenSample
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.pairs import PairSums
from lightning_smoe.functional.pooled_matching import PooledMatching
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.checkpoint import load

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "qwen2moe-tiny-8dom"


def calibration(rounds: int) -> None:
    """Compares the calibration pass with the plain forward pass over the same tokens."""
    data = TextDataModule(tokenizer=CHECKPOINT)
    data.windows("calib")
    model = load(CHECKPOINT)
    candidates: dict[str, Callable[[], None]] = {
        "plain forward": lambda: plain_forward(model, data),
        "calibration": lambda: calibrate(model, data),
    }
    show(f"calibration, {data.windows('calib').num_tokens} tokens", measure(candidates, rounds))


def plan(rounds: int) -> None:
    """Compares matched pooling with the forward pass of all experts that it needs, true to size."""
    evidence = random_evidence(num_experts=60, width=1408, hidden=2048, num_tokens=4096)

    def forward() -> None:
        for expert in range(evidence.num_experts):
            evidence.activations(expert)

    candidates: dict[str, Callable[[], None]] = {
        "gate and up projection of all experts": forward,
        "matched pooling, 60 -> 30": lambda: void(PooledMatching()(evidence, 30)),
    }
    show("plan of one layer, 4096 tokens", measure(candidates, rounds))


def pairs(rounds: int) -> None:
    """Compares sums over pairs of outputs with a loop over the pairs."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(60, 512, 2048, generator=generator)
    gates = torch.rand(512, 60, generator=generator)

    def loop() -> None:
        for first in outputs:
            for second in outputs:
                torch.cosine_similarity(first, second, dim=1).sum()
                distance = (first - second).square().sum(1)
                (gates[:, 0].square() * distance).sum()
                (gates[:, 0] * gates[:, 1] * distance).sum()

    candidates: dict[str, Callable[[], None]] = {
        "all pairs at once": lambda: PairSums.zeros(60, outputs.device).add(outputs, gates),
        "loop over pairs": loop,
    }
    show("outputs of 60 experts, 512 tokens, hidden size 2048", measure(candidates, rounds))


def recovery(rounds: int) -> None:
    """Compares fit with a bare PyTorch loop that does the same passes."""
    title, candidates = bench_recovery.loops()
    show(title, measure(candidates, rounds))


def floor(rounds: int) -> None:
    """Compares statistics and merging with the arithmetic that they need."""
    text: dict[str, Any] = bench_peers.text_of(bench_peers.TOKENS)
    with tempfile.TemporaryDirectory() as name:
        folder = bench_peers.write_model(Path(name) / "model", layers=8, experts=128)
        data, model = TextDataModule(tokenizer=CHECKPOINT, **text), load(folder)
    data.windows("calib")
    sizes = {"width": bench_floor.WIDTH, "hidden": bench_floor.HIDDEN}
    evidence = random_evidence(bench_floor.EXPERTS, num_tokens=bench_floor.TOKENS, **sizes)
    calibration = (lambda: calibrate(model, data), lambda: plain_forward(model, data))
    bench_floor.floor(calibration, evidence, rounds)


def random_evidence(num_experts: int, width: int, hidden: int, num_tokens: int) -> Evidence:
    """A layer of random weights and a sample of random tokens; its sums are not looked at."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return drawn

    weights = ExpertWeights(
        up_proj=draw(num_experts, width, hidden),
        down_proj=draw(num_experts, hidden, width),
        gate_proj=draw(num_experts, width, hidden),
    )
    states, router = draw(num_tokens, hidden), draw(num_experts, hidden)
    logits = states @ router.T
    gates, experts = logits.softmax(1).topk(4)
    sums: Any = None
    return Evidence(sums, TokenSample(states, logits, gates, experts), weights, swiglu)


def swiglu(gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """The activation of most families."""
    return up if gate is None else torch.nn.functional.silu(gate) * up


def void(_: object) -> None:
    """Drops a result."""


@torch.inference_mode()
def plain_forward(model: PreTrainedModel, data: TextDataModule) -> None:
    """Runs the model as a user would, logits included."""
    for batch in data.predict_dataloader():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def calibrate(model: PreTrainedModel, data: TextDataModule) -> None:
    """Runs the calibration pass with its hooks."""
    watch = ExpertStatistics(data.domains_of("calib"), Manifest("bench", {}))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(CalibrationModule(model), datamodule=data, return_predictions=False)


def stream(checkpoint: Path, recipe: str) -> None:
    """Prints what each step on a checkpoint larger than memory costs, on 2048 tokens."""
    Console().print(bench_stream.table(bench_stream.run(checkpoint, recipe, 2048, keep=30)))


def measure(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Times every candidate in turn; the first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            if number:
                times[name].append(time.process_time() - start)
    return times


def show(title: str, times: dict[str, list[float]]) -> None:
    """Prints medians, and the median ratio to the first candidate of the same round."""
    floor = next(iter(times.values()))
    table = Table("what", "CPU-seconds", "ratio to the first", title=title)
    for name, seconds in times.items():
        ratio = statistics.median(s / f for s, f in zip(seconds, floor, strict=True))
        table.add_row(name, f"{statistics.median(seconds):.2f}", f"{ratio:.2f}")
    Console().print(table)


def main() -> None:
    """Runs one benchmark."""
    benchmarks: dict[str, Callable[[int], None]] = {
        "calibration": calibration,
        "plan": plan,
        "pairs": pairs,
        "recovery": recovery,
        "recovery-memory": lambda _: bench_recovery.memory(),
        "peers": lambda rounds: bench_peers.peers(options.environment, rounds),
        "floor": floor,
        "growth": bench_growth.growth,
        "stream": lambda _: stream(options.checkpoint, options.recipe),
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", choices=list(benchmarks))
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, at least 1")
    parser.add_argument("--environment", type=Path, help="of llm-compressor, for peers")
    parser.add_argument("--checkpoint", type=Path, help="to compress 60 -> 30, for stream")
    parser.add_argument("--recipe", default="default", help="of configs/recipe, for stream")
    options = parser.parse_args()
    if options.benchmark == "peers" and options.environment is None:
        parser.error("peers needs --environment, a virtual environment with llm-compressor")
    if options.benchmark == "stream" and options.checkpoint is None:
        parser.error("stream needs --checkpoint, a folder with 60 experts a layer")
    warnings.filterwarnings(
        "ignore",
        ".*does not have many workers.*|.*LeafSpec.*|.*in eval mode.*|.*exists and is not.*",
    )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    benchmarks[options.benchmark](options.rounds)


if __name__ == "__main__":
    main()
