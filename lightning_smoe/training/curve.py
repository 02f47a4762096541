"""How the validation went over a training, whole also where the training was cut off."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_smoe.models.artifact import write_json

_KEY = "curve"


class Curve(Callback):
    """Keeps every validation in checkpoints and in a JSON file.

    Each point has `step`, `tokens` (trained on until then, by all processes, without padding) and
    each metric under `valid/`. A validation before training is the point of step 0.

    Args:
        path: File to write, at each validation.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.points: list[dict[str, float]] = []
        self._tokens = 0
        self._own_tokens: Tensor | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch's tokens on the device, which need not wait for it."""
        is_token = batch["attention_mask"].bool() & batch["valid"][:, None]
        seen = is_token.sum()
        self._own_tokens = seen if self._own_tokens is None else self._own_tokens + seen

    def _all_tokens(self, trainer: Trainer, pl_module: LightningModule) -> int:
        own = self._own_tokens
        if own is None:
            own = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        self._own_tokens = None
        self._tokens += int(trainer.strategy.reduce(own, reduce_op="sum"))
        return self._tokens

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds a point, and writes all of them."""
        is_fit = trainer.state.fn == TrainerFn.FITTING
        if trainer.sanity_checking or (not is_fit and self.points):
            return
        metrics = {
            name: value.item()
            for name, value in sorted(trainer.callback_metrics.items())
            if name.startswith("valid/")
        }
        tokens = self._all_tokens(trainer, pl_module)
        self.points.append({"step": trainer.global_step, "tokens": tokens, **metrics})
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            write_json(self._path, self.points)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the curve; every process comes here, as the tokens of all are added up."""
        tokens = self._all_tokens(trainer, pl_module)
        checkpoint[_KEY] = {"points": list(self.points), "tokens": tokens}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes up the curve of a training that goes on."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.points = list(checkpoint[_KEY]["points"])
            self._tokens = checkpoint[_KEY]["tokens"]
            self._own_tokens = None
            # The file may know of validations behind the checkpoint, or only of the start.
            self._write(trainer)
