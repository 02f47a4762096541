"""Models whose router rows share experts, in the package's own words."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.saving import save
from tests.families import NUM_EXPERTS
from tests.models.pruning import CARD, MANIFEST, unchanged_rows

# Experts of the first layer; the next one has one more.
KEPT = 5


def assignment_of(place: int) -> Tensor:
    """Neighbouring rows go to different experts, the last rows to the first experts again."""
    return torch.arange(NUM_EXPERTS) % (KEPT + place)


@torch.no_grad()
def share(model: PreTrainedModel) -> PreTrainedModel:
    """Lets rows of every layer share its first experts, a different number in each."""
    for place, layer in enumerate(find_moe_layers(model)):
        layer.share(layer.weights().select(torch.arange(KEPT + place)), assignment_of(place))
    return model


@torch.no_grad()
def copies(model: PreTrainedModel) -> PreTrainedModel:
    """The same function at full size: each row has its own copy of its expert."""
    for place, layer in enumerate(find_moe_layers(model)):
        layer.replace(layer.weights().select(assignment_of(place)), unchanged_rows)
    return model


def save_shared(source: Path, target: Path) -> PreTrainedModel:
    """Lets rows of a checkpoint share experts, in another folder; returns what was saved."""
    model = share(load(source))
    save(model, open_checkpoint(source), target, manifest=MANIFEST, card=CARD)
    return model
