"""Prunes a checkpoint with this project's REAP, from text to a written folder; says what it cost.

    python scripts/bench_own.py CHECKPOINT DATA.json TARGET [KEY=VALUE ...]

DATA.json holds arguments of `TextDataModule`, each KEY=VALUE one more of `Experiment`.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401 - part of starting
from bench_cost import Cost

from lightning_smoe.compression.recipe import Prune
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.experiment import Experiment
from lightning_smoe.functional.saliency import Reap
from lightning_smoe.trainer import SMoETrainer


def quiet_trainer() -> SMoETrainer:
    """A Trainer on the CPU that shows and keeps nothing."""
    return SMoETrainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def main() -> None:
    """Runs the verb `compress`, which calibrates and plans first, to half of the experts."""
    checkpoint, data, target, *settings = sys.argv[1:]
    warnings.filterwarnings("ignore")
    text: dict[str, Any] = json.loads(Path(data).read_text())
    more: dict[str, Any] = dict(setting.split("=") for setting in settings)
    more = {key: json.loads(value) for key, value in more.items()}
    recipe = Prune(Reap(), refit=None, protect=False)
    cost = Cost()
    trainer = quiet_trainer()
    experiment = Experiment(checkpoint, Path(target), recipe=recipe, **more)
    trainer.compress(experiment, TextDataModule(**text))
    cost.note("all steps")
    cost.tell()


if __name__ == "__main__":
    main()
