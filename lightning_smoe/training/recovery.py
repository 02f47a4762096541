"""Recovery: the compressed model learns from the original what it lost."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightning_smoe.data.positions import counted_positions
from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.sharding import shard
from lightning_smoe.training.adapters import prepare_training
from lightning_smoe.training.curve import Curve
from lightning_smoe.training.judged import JUDGED, DomainSums
from lightning_smoe.training.keeping import checkpoint_callbacks, last_good, relocate
from lightning_smoe.training.losses import Losses
from lightning_smoe.training.modes import set_modes
from lightning_smoe.training.monitor import RouterMonitor
from lightning_smoe.training.options import Recovery
from lightning_smoe.training.position_values import position_values
from lightning_smoe.training.random_state import RandomState
from lightning_smoe.training.rates import set_peaks, share_of_peak
from lightning_smoe.training.teacher import Teacher
from lightning_smoe.training.trained_state import keep_trained


class RecoveryModule(LightningModule):
    """Trains the student on the teacher's answers; the teacher never changes.

    Every loss is a mean over the counted tokens of all processes and of all batches of a step, so
    neither padding nor how rows are shared out decides a gradient. Only trainable parameters are in
    checkpoints, the teacher is in none.

    Args:
        student: The compressed model.
        teacher: The original, or its answers.
        recovery: What is trained, and how.
        folder: Folder for checkpoints; `last.ckpt` is the newest.
        domains: Names of the domains of the validation text, by number.
        assignments: By the name of a layer, the student's expert in the place of each of the
            teacher's, -1 where there is none; for objectives that compare routers.
    """

    _teacher: Teacher

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        recovery: Recovery,
        folder: Path,
        *,
        domains: Sequence[str] = ("text",),
        assignments: Mapping[str, Int[Tensor, " experts"]] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        # Not a sub-module: a teacher must not be trained, broadcast, counted or saved.
        object.__setattr__(self, "_teacher", teacher)
        self._recovery = recovery
        self._folder = folder
        self._domains = domains
        # Before adapters are wrapped around what they hold.
        layers = find_moe_layers(student)
        # Made once: the curve of a validation before training goes on in the training.
        self._callbacks = [
            RandomState(),
            RouterMonitor(layers),
            Curve(folder / "curve.json"),
            *checkpoint_callbacks(folder, recovery.checkpoint_every, recovery.patience),
        ]
        self._losses = Losses(
            student, layers, recovery.objectives, assignments, reduce=self._sum_over_processes
        )
        self._groups = prepare_training(
            student, recovery.parts, recovery.lora, learning_rate=recovery.learning_rate
        )
        set_modes(student, gradient_checkpointing=recovery.gradient_checkpointing)
        self.trainable_counts = {group.name: group.num_parameters for group in self._groups}
        self.strict_loading = False
        # Not in on_save_checkpoint: in slices, the whole model would be gathered before it.
        self.register_state_dict_post_hook(keep_trained)  # type: ignore[no-untyped-call]  # torch

    @property
    def teacher(self) -> Teacher:
        """The original, or its answers."""
        return self._teacher

    def configure_model(self) -> None:
        """Brings the teacher to the device, and shares both models out where that is asked for."""
        self._teacher.place(self.trainer.strategy.root_device)
        if self.device_mesh is not None:
            # Each time: validation leaves what lies outside the layers whole.
            shard(self.student, self.device_mesh["data_parallel"])

    def teardown(self, stage: str) -> None:
        """Takes the teacher off the device."""
        self._teacher.place(torch.device("cpu"))

    def configure_callbacks(self) -> list[Callback]:
        """Keeps the newest and the best student, all it needs to go on, and what routers do."""
        return self._callbacks

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        summed: Tensor = self.trainer.strategy.reduce(tensor, reduce_op="sum")
        return summed

    def on_train_start(self) -> None:
        """Starts the sums of a step, and the clock."""
        for config in self.trainer.strategy.lr_scheduler_configs:
            set_peaks(config.scheduler, self._groups)
        self._start_step()

    def _start_step(self) -> None:
        count = len(self._losses.names) + 2
        self._sums = torch.zeros(count, dtype=torch.float64, device=self.device)
        self._num_positions = 0
        self._started = time.monotonic()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Float[Tensor, ""]:
        """The weighted objectives summed over the tokens of the batch, for each of its positions.

        Raises:
            InputError: It is no finite number.
        """
        loss = self._losses(self._teacher, batch)
        if not bool(loss.total.isfinite()):
            self._refuse(batch, loss.total)
        totals = [loss.total.detach().double(), *loss.sums.values()]
        tokens = torch.tensor(loss.num_tokens, dtype=torch.float64, device=self.device)
        self._sums += torch.stack([*totals, tokens])
        # Known before the tokens of the other processes are: made good before the step.
        self._num_positions += batch["input_ids"].numel()
        return loss.total / batch["input_ids"].numel()

    def _refuse(self, batch: dict[str, Tensor], total: Tensor) -> None:
        documents = sorted(set(batch["document"][counted_positions(batch)].tolist()))
        raise InputError(
            f"the loss is {total.item()} at step {self.global_step} (documents {documents}); lower "
            f"model.recovery.learning_rate; {last_good(self._folder, self.global_step)}"
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Makes the gradient that of the mean over the step's tokens, and logs the means."""
        sums = self._sum_over_processes(self._sums)
        num_tokens = sums[-1].clamp_min(1)
        # Lightning divided by the batches of a step and the processes, training_step by positions.
        factor = self._num_positions * self.trainer.world_size / num_tokens
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, float(factor))
        means = (sums[:-1] / num_tokens).float()
        self.log("train/loss", means[0], prog_bar=True)
        self.log_dict({f"train/{n}": m for n, m in zip(self._losses.names, means[1:], strict=True)})
        seconds = time.monotonic() - self._started
        self.log("tokens/s", sums[-1].float() / seconds, prog_bar=True)
        for group in optimizer.param_groups:
            self.log(f"train/learning_rate/{group['name']}", group["lr"])
        self._start_step()

    def on_validation_epoch_start(self) -> None:
        """Starts the sums anew."""
        self._judged = DomainSums(self._domains, self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds up KL to the teacher and the student's negative log-likelihood, token by token."""
        found = position_values(self.student, self._teacher, batch, JUDGED)
        self._judged.add(found.values, batch["domain"][found.rows])

    def on_validation_epoch_end(self) -> None:
        """Logs the means over the tokens of all processes."""
        for name, mean in self._judged.means(self._sum_over_processes).items():
            # The same on every process; without sync_dist Lightning advises to set it.
            shown = name in ("kl", "perplexity")
            self.log(f"valid/{name}", mean, prog_bar=shown, sync_dist=True)
        # What validation took is no time of a step.
        self._started = time.monotonic()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam on the trainable parameters, with warm-up and decay to zero at the last step."""
        # By name: sharing a model out puts other parameters in their place.
        now = dict(self.student.named_parameters())
        groups: list[dict[str, Any]] = [
            {"params": [now[name] for name in g.parameters], "lr": g.learning_rate, "name": g.name}
            for g in self._groups
        ]
        optimizer = torch.optim.Adam(groups, lr=self._recovery.learning_rate)

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
        recovery = self._recovery
        # Not asked for before training runs: Lightning would load the text at once, and in a run
        # that is continued not where it stopped.
        is_warm = step > recovery.warmup_steps
        total = self.trainer.estimated_stepping_batches if is_warm else step
        return share_of_peak(step, int(total), recovery.warmup_steps, recovery.schedule)

    def _described(self) -> dict[str, Any]:
        """What a checkpoint and the run that goes on from it must have in common."""
        trained = [[group.name, list(group.parameters)] for group in self._groups]
        # The optimizer's state is kept by other numbers where the model is in slices.
        return {"trained": trained, "in_slices": self.device_mesh is not None}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes what is trained."""
        checkpoint["recovery"] = self._described()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares the checkpoint with the student.

        Raises:
            InputError: It lacks a parameter that is trained, holds another, or is of a model that
                was shared out otherwise.
        """
        relocate(checkpoint, self._folder)
        there, here = checkpoint["recovery"], self._described()
        names = [{n for _, group in state["trained"] for n in group} for state in (there, here)]
        differ = names[0] ^ names[1]
        if differ:
            raise InputError(
                f"the checkpoint is of a run that trained other parameters (such as "
                f"{min(differ)}); resume with the same model.recovery.trainable, or start afresh"
            )
        if there["trained"] != here["trained"]:
            # The optimizer's state goes by their order.
            raise InputError(
                f"the checkpoint is of a run with trainable={[g for g, _ in there['trained']]}, "
                f"and this one has {[g for g, _ in here['trained']]}; name the same in that order"
            )
        if there["in_slices"] != here["in_slices"]:
            raise InputError(
                "the checkpoint is of a run under another trainer.strategy; resume with the same"
            )
