"""The types and sizes that weights have on disk."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lightning_smoe.models.folder import CheckpointFolder

TORCH_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def type_in_folder(
    model: PreTrainedModel, source: CheckpointFolder, key: str, tensor: torch.Tensor
) -> str:
    """The type that a tensor of the model has in a folder, which may name it otherwise."""
    names = revert_weight_conversion(model, {key: tensor.to("meta")})
    found = {source.tensors[name]["dtype"] for name in names if name in source.tensors}
    return str(found.pop()) if len(found) == 1 else _common_type(source)


def _common_type(source: CheckpointFolder) -> str:
    """The floating-point type that most tensors of a folder have."""
    found = [entry["dtype"] for entry in source.tensors.values()]
    return max(TORCH_TYPES, key=found.count)


def stored_type(source: CheckpointFolder) -> torch.dtype:
    """The floating-point type that most tensors of a folder have."""
    return TORCH_TYPES[_common_type(source)]


def stored_bytes(model: nn.Module, source: CheckpointFolder) -> int:
    """Size that a model's weights will have on disk, in bytes, in the type of its original."""
    size = torch.finfo(stored_type(source)).bits // 8
    return sum(parameter.numel() * size for parameter in model.parameters())
