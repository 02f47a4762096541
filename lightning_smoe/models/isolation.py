"""Whether documents that share a window are kept apart, in models that may come layer by layer."""

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_smoe.models.head import check_isolates
from lightning_smoe.models.passes import begin, through
from lightning_smoe.models.residence import Residence
from lightning_smoe.models.walk import finish

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
    waiting = through(residence, begin(residence, batch, _CPU), residence.num_layers, _CPU)
    with residence.outside(_CPU, "inputs"):
        return finish(residence.model, batch, waiting.states)
