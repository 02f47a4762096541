"""What goes through decoder layers while a model is compressed, and where done layers go."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_smoe.compression.refit import RefitOutcome
from lightning_smoe.models.walk import WaitingBatch


@dataclass(frozen=True, eq=False)
class Streams:
    """The same text in the original and in the compressed model, between two decoder layers.

    Args:
        original: Every batch, behind the original's layers.
        compressed: Every batch, behind the compressed layers; the same until one was compressed.
    """

    original: Sequence[WaitingBatch]
    compressed: Sequence[WaitingBatch]

    @property
    def are_one(self) -> bool:
        """Whether no layer was compressed so far."""
        return self.compressed is self.original

    def states(self) -> dict[str, Tensor]:
        """The hidden states by name, to be noted."""
        both = {"original": self.original, "compressed": self.compressed}
        names = ["original"] if self.are_one else list(both)
        return {f"{n}.{i}": batch.states for n in names for i, batch in enumerate(both[n])}

    @staticmethod
    def of(
        batches: Sequence[WaitingBatch], states: Mapping[str, Tensor], device: torch.device
    ) -> "Streams":
        """The streams whose states were noted.

        Args:
            batches: The same text in front of the first layer.
            states: What `states` gave.
            device: Where they go on.
        """
        kept = [
            [batch.moved(states[f"{n}.{i}"].to(device)) for i, batch in enumerate(batches)]
            for n in ("original", "compressed")
            if f"{n}.0" in states
        ]
        return Streams(kept[0], kept[-1]) if kept else Streams(batches, batches)


class LayerSink(ABC):
    """Takes each decoder layer of a compressed model as soon as it is done."""

    @abstractmethod
    def resume(self) -> tuple[int, dict[str, Tensor], dict[str, RefitOutcome]]:
        """Layers that an earlier run put here, the states behind them, and their refits."""

    @abstractmethod
    def put(
        self,
        index: int,
        decoder: nn.Module,
        states: Mapping[str, Tensor],
        refits: Mapping[str, RefitOutcome],
    ) -> None:
        """Takes a layer, which may be let go afterwards.

        Args:
            index: Its number.
            decoder: The layer; its weights are rounded in place.
            states: Hidden states behind it.
            refits: What the refits of all layers so far did.
        """
