"""What several tests of this room do to a model, in the package's own words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.expert_count import set_expert_count
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.router import RouterTensor
from lightning_smoe.models.saving import save

MANIFEST = Manifest("compress", {"checkpoint": "abc"})
CARD = "A tiny model."


class DiskUsage(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


def last_experts(layer: MoELayer, count: int) -> Tensor:
    """The last experts of each router group, `count` in all."""
    groups = layer.num_router_groups
    return torch.arange(layer.num_experts).view(groups, -1)[:, -(count // groups) :].flatten()


def prune(model: nn.Module, counts: int | Mapping[int, int]) -> None:
    """Drops the first experts of every layer, or of the decoder layers that are named."""
    for layer in find_moe_layers(model):
        count = counts if isinstance(counts, int) else counts.get(layer.index)
        if count is not None:
            layer.select(last_experts(layer, count))
    if isinstance(counts, int):
        set_expert_count(model, counts)


def save_pruned(
    source: Path, target: Path, counts: int | Mapping[int, int], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Prunes a checkpoint into another folder; returns the model that was saved."""
    model = load(source, dtype)
    prune(model, counts)
    save(model, open_checkpoint(source), target, manifest=MANIFEST, card=CARD)
    return model


def unchanged_rows(tensor: RouterTensor) -> Tensor:
    """The router as it is, for `MoELayer.replace`."""
    return tensor.rows


def load_stock(folder: Path) -> PreTrainedModel:
    """Loads a folder as anybody would, and insists that every tensor finds its place."""
    # Any: transformers declares no type for the pair that it returns here.
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    assert isinstance(model, PreTrainedModel)
    assert not any(report.values()), report
    return model


def full_disk(path: object) -> DiskUsage:
    """Stands in for shutil.disk_usage."""
    return DiskUsage(total=10**9, used=10**9, free=0)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, as its files hold it."""
    files = sorted(folder.glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def store_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes the one weight file of a folder anew."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file of a folder, hidden ones too, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
