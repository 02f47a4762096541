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
from lightning_smoe.training.monitor import RouterMonitor
from lightning_smoe.training.trainable import Part, select_trainable


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
        self._loaded_types = {name: p.dtype for name, p in student.named_parameters()}
        self.trainable_counts = select_trainable(student, recovery.trainable)
        self.strict_loading = False
        self._sums = torch.zeros(3, dtype=torch.float64)

    def finished_student(self) -> PreTrainedModel:
        """The student, its weights in the types in which they came."""
        for name, parameter in self.student.named_parameters():
            parameter.data = parameter.data.to(self._loaded_types[name])
        return self.student

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
            raise InputError(
                f"the loss is {loss.item()} at step {self.global_step} (documents {documents}); "
                "lower model.recovery.learning_rate"
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
        kl, nll = sums[:2] / sums[2]
        # The same on every process; without sync_dist Lightning advises to set it.
        self.log("valid/kl", kl.float(), prog_bar=True, sync_dist=True)
        self.log("valid/perplexity", nll.exp().float(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam on the trainable parameters, with warm-up and decay to zero at the last step."""
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=self._recovery.learning_rate)

        def factor(step: int) -> float:
            # A plain function: of a method torch would store the attributes in checkpoints.
            return self._factor(step)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _factor(self, step: int) -> float:
        """Share of the peak learning rate after some steps."""
        warmup = self._recovery.warmup_steps
        if step <= warmup:
            return (step + 1) / (warmup + 1)
        # Not asked for before training runs: Lightning would load the text at once, and in a run
        # that is continued not where it stopped.
        total = self.trainer.estimated_stepping_batches
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        is_linear = self._recovery.schedule == "linear"
        return 1 - done if is_linear else (1 + math.cos(math.pi * done)) / 2

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
