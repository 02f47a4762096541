"""Which windows each process sees, in which order, and how a loader goes on where it stopped."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_smoe.data.choice import keyed_generator
from lightning_smoe.data.mixing import Mixture
from lightning_smoe.data.packing import TokenWindows
from lightning_smoe.errors import InputError


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Windows one by one, each with its number and a flag that says whether it counts.

    Args:
        windows: Windows of a split.
    """

    def __init__(self, windows: TokenWindows) -> None:
        self.tensors = windows.tensors()

    def __len__(self) -> int:
        """Counts the windows."""
        return len(self.tensors["domain"])

    def __getitem__(self, item: int | tuple[int, bool]) -> dict[str, Tensor]:
        """Returns the tensors of a window, `window`, its index, and `valid`, whether it counts."""
        index, is_real = item if isinstance(item, tuple) else (item, True)
        window = {name: tensor[index] for name, tensor in self.tensors.items()}
        return window | {"window": torch.tensor(index), "valid": torch.tensor(is_real)}


class PaddedSampler(DistributedSampler[tuple[int, bool]]):
    """Every sample in fixed order, equally many on each process, repeats marked as such.

    Yields (index, is_real). Processes need equally many batches where a forward pass communicates
    (FSDP, tensor parallel); a statistic must leave out what is not real. Lightning would
    put its own sampler, which repeats silently, in place of any that is no DistributedSampler.

    Args:
        dataset: Samples to go through.
        num_replicas: Processes that share the samples, at least 1.
        rank: Number of this process, from 0.
    """

    def __init__(self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        self.num_real = len(dataset)  # type: ignore[arg-type]  # torch's Dataset declares no len

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        """Goes through the samples of this process."""
        for position in range(self.rank, self.total_size, self.num_replicas):
            yield position % self.num_real, position < self.num_real


class EpochSampler(DistributedSampler[int]):
    """Every sample once an epoch, in an order that depends on seed and epoch only.

    Differs from torch's sampler in that the orders of seed 42 are not those of seed 43 one epoch
    later, and in that an epoch is a whole number of optimizer steps: none spans two epochs, so a
    checkpoint after a step is a whole state. What is left over is dropped, another part each epoch.

    Args:
        dataset: Samples to go through, at least `num_replicas * samples_a_step`.
        num_replicas: Processes that share the samples, at least 1.
        rank: Number of this process, from 0.
        seed: Seed of the order.
        samples_a_step: Samples that a process takes in one optimizer step, at least 1.
        mixture: Draws the samples of an epoch; none takes each once.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        num_replicas: int = 1,
        rank: int = 0,
        *,
        seed: int = 42,
        samples_a_step: int = 1,
        mixture: Mixture | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed, drop_last=True)
        self.num_real = len(dataset)  # type: ignore[arg-type]  # torch's Dataset declares no len
        self.num_samples = self.num_real // (num_replicas * samples_a_step) * samples_a_step
        self.total_size = self.num_samples * num_replicas
        self.mixture = mixture

    def __iter__(self) -> Iterator[int]:
        """Goes through the samples of this process in this epoch."""
        order = keyed_generator(self.seed, self.epoch)
        if self.mixture is None:
            drawn = torch.randperm(self.num_real, generator=order)
        else:
            drawn = self.mixture.draw(self.epoch, self.total_size, self.seed)
            drawn = drawn[torch.randperm(len(drawn), generator=order)]
        return iter(drawn[self.rank : self.total_size : self.num_replicas].tolist())


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A DataLoader that goes on at the next batch after its state was loaded.

    Lightning saves the state of a loader that has these two methods, loads it before the first
    epoch, and sets the sampler's epoch later. The position therefore counts for the saved
    epoch only: a checkpoint of an epoch's end starts the next epoch from its beginning, also
    where `limit_train_batches` ended the epoch early. The batches before it are fetched and
    dropped, which costs microseconds each.
    """

    # No __init__: Lightning builds the loader anew from its arguments where it changes the sampler.
    _position = 0
    _resume: tuple[int, int] | None = None

    @property
    def _epoch(self) -> int:
        return self.sampler.epoch if isinstance(self.sampler, DistributedSampler) else 0

    def _layout(self) -> dict[str, int | None]:
        return {"batches an epoch": len(self), "sequences a batch": self.batch_size}

    # typed Any: torch declares a private iterator class here.
    def __iter__(self) -> Any:
        """Goes through the batches of the epoch that are still to come."""
        epoch, position = self._resume or (self._epoch, 0)
        self._resume = None
        self._position = position if epoch == self._epoch else 0
        batches = super().__iter__()
        for _ in islice(batches, self._position):
            pass
        for batch in batches:
            # Counted before it is handed out: a checkpoint is written while the batch is in use.
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the epoch and how many of its batches were handed out."""
        return {"epoch": self._epoch, "position": self._position, "layout": self._layout()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position.

        Args:
            state: What `state_dict` returned.

        Raises:
            InputError: Text, batch size or number of processes differ from the saved run's.
        """
        if state["layout"] != self._layout():
            raise InputError(
                f"the checkpoint was written with {state['layout']} but this run has "
                f"{self._layout()} -> resume with the same data options and number of processes"
            )
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(state["epoch"])
        self._resume = (state["epoch"], state["position"])
