"""Where the weights of a model are while it is worked on decoder layer by decoder layer."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_smoe.models.walk import decoder_layers

Outside = Literal["inputs", "head", "all"]


class Residence(ABC):
    """A model of which the parts that are needed now, and maybe no others, have their weights.

    Args:
        model: The model; parts that are away are on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(decoder_layers(self.model))

    @property
    @abstractmethod
    def streams(self) -> bool:
        """Whether layers come from the disk, and are gone when they are let go."""

    @abstractmethod
    def layer(self, index: int, device: torch.device) -> AbstractContextManager[nn.Module]:
        """Holds a decoder layer's weights on a device for a while.

        Args:
            index: Number of the layer, from zero.
            device: Where it is to run.
        """

    @abstractmethod
    def outside(
        self, device: torch.device, part: Outside = "all"
    ) -> AbstractContextManager[PreTrainedModel]:
        """Holds what is not in decoder layers on a device for a while.

        Args:
            device: Where it is to run.
            part: `inputs` leaves out the output matrix, `head` the input embedding, unless both
                are one.
        """


class InMemory(Residence):
    """A model that has all of its weights, on the device where it is."""

    @property
    def streams(self) -> bool:
        """No: what was done to a layer stays."""
        return False

    def layer(self, index: int, device: torch.device) -> AbstractContextManager[nn.Module]:
        """The layer, as it is there already."""
        return nullcontext(decoder_layers(self.model)[index])

    def outside(
        self, device: torch.device, part: Outside = "all"
    ) -> AbstractContextManager[PreTrainedModel]:
        """The model, as it is there already."""
        return nullcontext(self.model)
