"""Whether documents that share a window are kept apart, in models that may come layer by layer."""

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_smoe.models.head import check_isolates
from lightning_smoe.models.residence import Residence
from lightning_smoe.models.walk import embed, finish, run_layer

_CPU = torch.device("cpu")


def check_residence_isolates(residence: Residence) -> None:
    """Checks that documents of a window do not see each other.

    Raises:
        InputError: They do, in this family.
    """
    walk = partial(walked_states, residence) if residence.streams else None
    check_isolates(residence.model, walk)


def walked_states(
    residence: Residence, batch: Mapping[str, Tensor]
) -> Float[Tensor, "batch sequence hidden"]:
    """Final hidden states of a batch on the CPU, one decoder layer at a time."""
    with residence.outside(_CPU, "inputs"):
        waiting = embed(residence.model, batch, torch.ones_like(batch["input_ids"]).bool())
    for index in range(residence.num_layers):
        with residence.layer(index, _CPU) as decoder:
            waiting = waiting.moved(run_layer(decoder, waiting, index))
    with residence.outside(_CPU, "inputs"):
        return finish(residence.model, batch, waiting.states)
