"""The smallest training there is: a line with dropout, through a few made-up sequences."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

from lightning_smoe.data.samplers import ResumableLoader
from lightning_smoe.training.checkpoint_io import AtomicCheckpointIO

NUM_BATCHES = 8


def batches() -> DataLoader[Any]:
    """Eight batches of one sequence of four tokens, of which every second has one of padding."""
    rows = [
        {
            "input": torch.full((4,), float(index)),
            "attention_mask": torch.tensor([1, 1, 1, index % 2]),
            "valid": torch.tensor(True),
        }
        for index in range(NUM_BATCHES)
    ]
    dataset: Any = rows
    return ResumableLoader(dataset, batch_size=1, sampler=SequentialSampler(rows))


class Line(LightningModule):
    """Learns nothing much; its validation gives the numbers it was given, one after another.

    Args:
        scores: What `valid/kl` will be; the last one stays.
    """

    def __init__(self, scores: tuple[float, ...] = (1.0,)) -> None:
        super().__init__()
        self.line = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.5))
        self._scores = scores
        self.noise: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """A loss with noise in it."""
        noise = torch.rand(())
        self.noise.append(noise.item())
        loss: Tensor = self.line(batch["input"]).mean() * noise
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs the next score, by the steps taken so that it is the same after a resume."""
        index = min(self.trainer.global_step, len(self._scores) - 1)
        self.log("valid/kl", self._scores[index], batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        """Eight batches."""
        return batches()

    def val_dataloader(self) -> DataLoader[Any]:
        """Eight batches."""
        return batches()


def line_trainer(max_steps: int, folder: Path, **options: Any) -> Trainer:
    """A trainer that validates every second batch and keeps nothing of its own."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": max_steps,
        "max_epochs": 1000,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "plugins": [AtomicCheckpointIO()],
    }
    return Trainer(**(settings | options))
