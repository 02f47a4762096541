"""Times parts of the project beside their floor, in one run: ratios hold on a noisy machine.

    python scripts/bench.py calibration

The unit is CPU-seconds of this process (all threads), the median over rounds in which the
candidates take turns.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from lightning_smoe.calibration.module import CalibrationModule, ExpertStatistics
from lightning_smoe.data.text import TextDataModule
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
        "routed-token statistics": lambda: calibrate(model, data, all_experts=False),
        "all-expert statistics": lambda: calibrate(model, data, all_experts=True),
    }
    show(f"calibration, {data.windows('calib').num_tokens} tokens", measure(candidates, rounds))


@torch.inference_mode()
def plain_forward(model: PreTrainedModel, data: TextDataModule) -> None:
    """Runs the model as a user would, logits included."""
    for batch in data.predict_dataloader():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def calibrate(model: PreTrainedModel, data: TextDataModule, *, all_experts: bool) -> None:
    """Runs the calibration pass with its hooks."""
    watch = ExpertStatistics(data.domains_of("calib"), Manifest("bench", {}), all_experts)
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", choices=["calibration"])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, at least 1")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    {"calibration": calibration}[options.benchmark](options.rounds)


if __name__ == "__main__":
    main()
