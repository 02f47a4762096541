"""Random numbers that go on where a checkpoint was written."""

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_smoe.errors import InputError

logger = logging.getLogger(__name__)

_KEY = "random_state"


def read_generators(device: torch.device) -> dict[str, Any]:
    """States of the global generators of this process, as tensors and numbers only.

    Args:
        device: Device of this process; of other GPUs no generator is touched, which would
            take memory there.
    """
    numpy = np.random.get_state(legacy=False)
    version, words, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        # A checkpoint that is loaded as data alone may hold tensors, not arrays.
        # torch cannot send tensors of numpy's uint32 to other processes.
        "numpy": numpy | {"state": _with_key(numpy, _to_tensor)},
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def write_generators(states: dict[str, Any], device: torch.device) -> None:
    """Puts the global generators of this process back into states that `read_generators` gave."""
    torch.set_rng_state(states["torch"])
    python = states["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    numpy = states["numpy"]
    np.random.set_state(numpy | {"state": _with_key(numpy, _to_array)})
    if device.type == "cuda":
        if "cuda" not in states:
            logger.warning("fit: the checkpoint was written on a CPU; the GPU's dropout differs")
            return
        torch.cuda.set_rng_state(states["cuda"], device)


def _with_key(numpy: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    return {**numpy["state"], "key": convert(numpy["state"]["key"])}


def _to_tensor(words: Any) -> Int64[Tensor, " words"]:
    return torch.from_numpy(words.astype(np.int64))


def _to_array(words: Int64[Tensor, " words"]) -> Any:
    return words.numpy().astype(np.uint32)


class RandomState(Callback):
    """Saves the generators of every process, and restores them before the first batch.

    Dropout and router noise then go on as if training had not stopped. Lightning saves none.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the states of all processes; every process comes here."""
        mine = read_generators(pl_module.device)
        states: list[Any] = [mine]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, mine)
        checkpoint[_KEY] = states

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the states of this process, to be restored when training starts.

        Raises:
            InputError: The checkpoint has none, or those of another number of processes.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        states = checkpoint.get(_KEY)
        if states is None:
            raise InputError(
                "the checkpoint has no states of random generators, so training could not go on "
                "as it was; start afresh"
            )
        if len(states) != trainer.world_size:
            raise InputError(
                f"the checkpoint was written by {len(states)} processes and this run has "
                f"{trainer.world_size}; resume with trainer.devices x num_nodes = {len(states)}, "
                "or start afresh"
            )
        self._loaded = states[trainer.global_rank]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores before the loader of a new epoch draws its seed."""
        self._restore(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restores within an epoch, where the loader that starts again has drawn once more."""
        self._restore(pl_module)

    def _restore(self, pl_module: LightningModule) -> None:
        if self._loaded is not None:
            write_generators(self._loaded, pl_module.device)
            self._loaded = None
