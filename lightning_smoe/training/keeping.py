"""Which states of a training are kept, and how it goes on from one."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_smoe.errors import InputError

# Adam keeps two moments of each weight, in the weight's type.
_NUM_MOMENTS = 2
# Of a checkpoint, for each number that is trained in float32.
CHECKPOINT_BYTES = 4 * (1 + _NUM_MOMENTS)


def checkpoint_bytes(module: nn.Module) -> int:
    """Size of one checkpoint in bytes: what is trained, and Adam's two moments of it.

    Settings, generators and names add some tens of kilobytes.
    """
    trained = (p for p in module.parameters() if p.requires_grad)
    return (1 + _NUM_MOMENTS) * sum(p.numel() * p.element_size() for p in trained)


def last_good(folder: Path, step: int) -> str:
    """Says which checkpoint is the newest from before a step whose loss is no number.

    One that was written just before it holds the weights that gave it.

    Args:
        folder: Folder of the checkpoints.
        step: Steps taken before the loss.
    """
    found = {
        torch.load(path, "cpu", weights_only=True, mmap=True)["global_step"]: path
        for path in sorted(folder.glob("*.ckpt"))
    }
    good = [number for number in found if number < step]
    if good:
        return f"the last good checkpoint is {found[max(good)]}, of step {max(good)}"
    return "there is no checkpoint from before" if found else "there is no checkpoint"


def checkpoint_callbacks(
    folder: Path,
    every_n_steps: int | None = None,
    patience: int | None = None,
    monitor: str = "valid/kl",
) -> list[Callback]:
    """Callbacks that keep the newest and the best state, and stop when nothing improves.

    Their order counts: what one decides at a validation must be in the checkpoint of the last.

    Args:
        folder: Folder for `last.ckpt` and `best.ckpt`.
        every_n_steps: Steps between writing `last.ckpt`, 1 or more; null writes it at
            validations only.
        patience: Validations without improvement after which training stops, 1 or more; null
            never stops.
        monitor: Metric of the validation whose minimum is the best.
    """
    # At the end of an epoch both would act after the checkpoint that must know of it.
    stopping = [] if patience is None else [_stopping(monitor, patience)]
    best = ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor=monitor,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    return [*stopping, best, LastCheckpoint(folder, every_n_steps)]


def _stopping(monitor: str, patience: int) -> EarlyStopping:
    if patience < 1:
        raise ValueError(f"patience={patience} must be 1 or more")
    return EarlyStopping(monitor, patience=patience, check_on_train_epoch_end=False)


def relocate(checkpoint: dict[str, Any], folder: Path) -> None:
    """Lets a checkpoint's best one be that of the folder it is loaded for, in place.

    Lightning keeps absolute paths, and forgets the best score where a folder was moved. Where the
    folder has no best checkpoint, the score is forgotten: nothing could be loaded in its place.

    Args:
        checkpoint: What was loaded.
        folder: Folder of this run's checkpoints.
    """
    # As Lightning writes paths.
    folder = Path(os.path.realpath(folder))
    best = str(folder / "best.ckpt")
    for name, state in checkpoint["callbacks"].items():
        if not name.startswith(ModelCheckpoint.__name__):
            continue
        # A best one that the checkpoint does not know of was written behind it.
        if state["best_k_models"] and Path(best).exists():
            state |= {"best_model_path": best, "kth_best_model_path": best}
            state["best_k_models"] = {best: state["best_model_score"]}
        else:
            state |= {"best_model_path": "", "kth_best_model_path": "", "best_k_models": {}}
            state |= {"best_model_score": None, "kth_value": torch.tensor(torch.inf)}
        state["dirpath"] = str(folder)


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` where nothing is under way: between steps, or after a validation.

    Lightning's ModelCheckpoint also writes within an accumulation window, whose gradients are in
    no checkpoint, and before a validation that is due, which is then left out on resuming.

    Args:
        folder: Folder of the file.
        every_n_steps: Steps between two writes, 1 or more; null writes at validations only. A
            write that would fall on the last batch of an epoch waits for the next step.
    """

    def __init__(self, folder: Path, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be 1 or more")
        self.path = folder / "last.ckpt"
        self._every_n_steps = every_n_steps
        self._saved_step = 0
        self._patiences: list[int] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes the settings that loading a checkpoint would replace."""
        self._patiences = [stopping.patience for stopping in trainer.early_stopping_callbacks]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on from the restored step, and not at all where training had stopped itself.

        Raises:
            InputError: A validation would fall into an accumulation window.
        """
        _check_validation(trainer)
        self._saved_step = trainer.global_step
        for stopping, patience in zip(
            trainer.early_stopping_callbacks, self._patiences, strict=True
        ):
            stopping.patience = patience
            is_exhausted = stopping.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
            if is_exhausted and stopping.wait_count < patience:
                stopping.stopping_reason = EarlyStoppingReason.NOT_STOPPED
            if stopping.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
                trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Writes when enough steps were taken since the last time."""
        if self._every_n_steps is None:
            return
        # From the end of an epoch Lightning 2.6 goes on without the start of the next, and so with
        # other random numbers; from a validation there it does not.
        is_due = trainer.global_step - self._saved_step >= self._every_n_steps
        if is_due and not trainer.is_last_batch and _is_between_steps(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes, with what other callbacks made of the validation."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
        self._saved_step = trainer.global_step


def _is_between_steps(trainer: Trainer) -> bool:
    """Whether the window of the batch that ends is complete, and no validation follows."""
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    return not loop._should_accumulate() and not loop._should_check_val_fx(fetcher)  # type: ignore[arg-type]  # set while batches are fetched


def _check_validation(trainer: Trainer) -> None:
    interval, window = trainer.val_check_batch, trainer.accumulate_grad_batches
    if not trainer.enable_validation or not isinstance(interval, int):
        return
    batches = trainer.num_training_batches
    within_epochs = trainer.check_val_every_n_epoch is not None
    is_whole = interval % window == 0 or (within_epochs and interval == batches)
    if not is_whole or (not within_epochs and batches % window):
        raise InputError(
            f"a validation every {interval} batches, in epochs of {batches}, falls into a step of "
            f"{window}; make trainer.val_check_interval a multiple of "
            "trainer.accumulate_grad_batches"
        )
