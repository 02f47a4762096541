"""Whether a model runs as its configuration says."""

import torch

from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.passes import begin, through
from lightning_smoe.models.residence import Residence

_CPU = torch.device("cpu")
# What arithmetic raises on sizes that do not fit each other.
_DOES_NOT_FIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_LONGEST_REASON = 500  # characters


def check_runs(residence: Residence) -> None:
    """Takes two tokens through the decoder layers: some fields of config.json are read only then.

    Of a model that comes from the disk only the layers up to the first with experts are tried.

    Raises:
        InputError: Fields do not fit the weights or each other, or the states are not finite.
    """
    model = residence.model
    tokens = torch.tensor([[0, 1]])
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    last = find_moe_layers(model)[0].index if residence.streams else residence.num_layers - 1
    name = model.config.name_or_path
    try:
        waiting = through(residence, begin(residence, batch, _CPU), last + 1, _CPU)
    except InputError:
        raise
    except _DOES_NOT_FIT as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST_REASON]
        raise InputError(
            f"{name} cannot run as its config.json says ({reason}); copy the checkpoint again"
        ) from error
    if not bool(torch.isfinite(waiting.states).all()):
        raise InputError(
            f"{name} gives states that are NaN or infinite, in {waiting.states.dtype}; set "
            "model.dtype=float32 or bfloat16, or copy the checkpoint again"
        )
