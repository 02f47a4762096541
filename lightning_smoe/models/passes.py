"""One batch through the decoder layers of a model that may come from its files."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_smoe.models.residence import Residence
from lightning_smoe.models.walk import WaitingBatch, embed, run_layer


def begin(residence: Residence, tokens: Mapping[str, Tensor], device: torch.device) -> WaitingBatch:
    """Takes a batch without padding up to the first decoder layer.

    Args:
        residence: The model.
        tokens: As for `final_states`.
        device: Where the batch is.
    """
    with residence.outside(device, "inputs") as model:
        return embed(model, tokens, torch.ones_like(tokens["input_ids"]).bool())


def through(
    residence: Residence, waiting: WaitingBatch, num_layers: int, device: torch.device
) -> WaitingBatch:
    """Takes a batch through the first decoder layers, one after the other.

    Args:
        residence: The model.
        waiting: The batch in front of the first layer.
        num_layers: How many layers.
        device: Where the batch is.
    """
    for index in range(num_layers):
        with residence.layer(index, device) as decoder:
            waiting = waiting.moved(run_layer(decoder, waiting, index))
    return waiting
