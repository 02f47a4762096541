"""Recovery: the compressed model learns from the original what it lost."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.functional.divergence import kl_divergence, token_nll
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.training.monitor import RouterMonitor

Part = Literal["router", "experts", "shared", "all"]


@dataclass(frozen=True)
class Recovery:
    """How the compressed model is trained against the original.

    Args:
        trainable: Parts that change: router, experts, shared (the shared expert and its gate), or
            all for every parameter.
        learning_rate: Peak step size of Adam, above 0.
        schedule: How it falls to zero after the warm-up: cosine or linear.
        warmup_steps: Steps over which it rises from zero, 0 or more.
        temperature: Both models' logits are divided by it in the loss, above 0.
    """

    trainable: Sequence[Part] = ("router",)
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear"] = "linear"
    warmup_steps: int = 10
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.trainable:
            raise ValueError("trainable is empty; name router, experts, shared or all")
        if not self.learning_rate > 0 or not self.temperature > 0:
            raise ValueError("learning_rate and temperature must be above 0")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be 0 or more")


def select_trainable(model: PreTrainedModel, parts: Sequence[Part]) -> dict[str, int]:
    """Lets only the named parts of a model change.

    Returns:
        Number of trainable parameters of each part.

    Raises:
        InputError: The model has no such part.
    """
    model.requires_grad_("all" in parts)
    counts: dict[str, int] = {}
    for part in parts:
        if part == "all":
            counts[part] = sum(p.numel() for p in model.parameters())
            continue
        chosen = [p for layer in find_moe_layers(model) for p in layer.parameters_of(part)]
        if not chosen:
            raise InputError(
                f"model.recovery.trainable names {part}, which the model does not have"
            )
        for parameter in chosen:
            parameter.requires_grad_(True)
        counts[part] = sum(p.numel() for p in chosen)
    return counts


class RecoveryModule(LightningModule):
    """Trains the student on the teacher's next-token distributions; the teacher never changes.

    The loss is KL(teacher || student) on logits in nats a token (Router KD,
    https://arxiv.org/abs/2603.02217, where only routers are trainable). Only trainable parameters
    are in checkpoints, the teacher is in none.

    Args:
        student: The compressed model.
        teacher: The original.
        recovery: What is trained, and how.
        checkpoints: Folder for checkpoints; `last.ckpt` is the newest.
    """

    _teacher: PreTrainedModel

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        recovery: Recovery,
        checkpoints: Path,
    ) -> None:
        super().__init__()
        self.student = student
        # Not a sub-module: a teacher must not be trained, broadcast, counted or saved.
        object.__setattr__(self, "_teacher", teacher.eval().requires_grad_(False))
        self._recovery = recovery
        self._checkpoints = checkpoints
        self.trainable_counts = select_trainable(student, recovery.trainable)
        self.strict_loading = False
        self._sums = torch.zeros(3, dtype=torch.float64)

    def setup(self, stage: str) -> None:
        """Moves the teacher to the device where the student is trained."""
        self._teacher.to(self.trainer.strategy.root_device)  # type: ignore[arg-type]  # transformers 5.23

    def teardown(self, stage: str) -> None:
        """Takes the teacher off the device."""
        self._teacher.cpu()

    def configure_callbacks(self) -> list[Callback]:
        """Keeps the best student by validation KL, and the newest; draws what the routers do."""
        best = ModelCheckpoint(
            dirpath=self._checkpoints,
            filename="best",
            monitor="valid/kl",
            save_last=True,
            enable_version_counter=False,
        )
        return [best, RouterMonitor()]

    def _both_logits(
        self, batch: dict[str, Tensor]
    ) -> tuple[Float[Tensor, "batch sequence vocab"], Float[Tensor, "batch sequence vocab"]]:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            wanted = self._teacher(**inputs, use_cache=False).logits
        return wanted, self.student(**inputs, use_cache=False).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Float[Tensor, ""]:
        """Mean KL to the teacher over the tokens of the batch."""
        wanted, found = self._both_logits(batch)
        divergence = kl_divergence(wanted, found, self._recovery.temperature)
        real = batch["attention_mask"].bool()
        loss: Tensor = divergence[real].mean()
        if not bool(loss.isfinite()):
            documents = sorted(set(batch["document"][real].tolist()))
            raise RuntimeError(
                f"the loss is {loss.item()} at step {self.global_step} (documents {documents}); "
                "lower model.recovery.learning_rate; the last good checkpoint is in "
                f"{self._checkpoints}"
            )
        self.log("train/kl", loss, prog_bar=True)
        self.log("train/learning_rate", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]  # one
        return loss

    def on_validation_epoch_start(self) -> None:
        """Starts the sums anew, on the device of the student."""
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds up KL to the teacher and the student's negative log-likelihood, token by token."""
        wanted, found = self._both_logits(batch)
        real = batch["attention_mask"].bool() & batch["valid"][:, None]
        real = real[:, 1:] & real[:, :-1]
        divergence = kl_divergence(wanted[:, :-1], found[:, :-1])[real].double().sum()
        nll = token_nll(found[:, :-1], batch["input_ids"][:, 1:])[real].double().sum()
        self._sums += torch.stack([divergence, nll, real.sum().double()])

    def on_validation_epoch_end(self) -> None:
        """Logs the means over the tokens of all processes."""
        sums = self.trainer.strategy.reduce(self._sums.clone(), reduce_op="sum")
        divergence, nll, tokens = sums.tolist()
        kl = torch.tensor(divergence / tokens, dtype=torch.float32)
        self.log("valid/kl", kl, prog_bar=True, rank_zero_only=False)
        self.log("valid/perplexity", math.exp(nll / tokens), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam on the trainable parameters, with warm-up and decay to zero at the last step."""
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=self._recovery.learning_rate)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor(total))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _factor(self, total: int) -> Any:
        warmup, kind = self._recovery.warmup_steps, self._recovery.schedule

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            done = min(1.0, (step - warmup) / max(1, total - warmup))
            return 1 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2

        return factor

    def _trainable_names(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out what training does not change."""
        names = self._trainable_names()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in sorted(names)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares the checkpoint with the student.

        Raises:
            InputError: It lacks a parameter that is trained, or holds another.
        """
        differ = self._trainable_names() ^ checkpoint["state_dict"].keys()
        if differ:
            part = re.sub(r"^student\.", "", min(differ))
            raise InputError(
                f"the checkpoint is of a run that trained other parameters (such as {part}); "
                "resume with the same model.recovery.trainable, or start afresh"
            )
