"""The names, types and sizes that weights have on disk."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lightning_smoe.models.folder import CheckpointFolder
from lightning_smoe.models.layer import decoder_layer_of, find_moe_layers
from lightning_smoe.models.shards import MAX_SHARD_SIZE, ShardLayout, StoredTensor

TORCH_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored_layout(
    model: PreTrainedModel, source: CheckpointFolder, max_bytes: int = MAX_SHARD_SIZE
) -> ShardLayout:
    """Where each tensor of a model will lie on disk, whether or not its weights are there.

    Args:
        model: The model; any part of it may be on the meta device.
        source: Folder of its original.
        max_bytes: Weights in one file at most, in bytes.
    """
    shapes = {key: tensor.to("meta") for key, tensor in model.state_dict().items()}
    state = stored_state(model, source, shapes)
    return ShardLayout.of({k: StoredTensor.of(t) for k, t in state.items()}, max_bytes)


def stored_state(
    model: PreTrainedModel, source: CheckpointFolder, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A part of a model under the names and in the types that it has on disk.

    Args:
        model: The model.
        source: Folder of its original, whose types it takes.
        state: Tensors by their names in the model, of whole modules; tied ones may be among them
            more than once and come out once.
    """
    left_out = _not_stored(model)
    typed = {
        key: tensor.detach().to(_type_on_disk(model, source, key, tensor))
        for key, tensor in state.items()
        if key not in left_out
    }
    stored: dict[str, Tensor] = revert_weight_conversion(model, typed)
    return stored


def state_parts(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """The state of a model in parts: what is outside of decoder layers, then each of those."""
    path, _ = decoder_layer_of(find_moe_layers(model)[0].name)
    number = re.compile(re.escape(path) + r"\.(\d+)\.")
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in model.state_dict().items():
        match = number.match(key)
        parts.setdefault(int(match[1]) if match else -1, {})[key] = tensor
    return (parts[index] for index in sorted(parts))


@torch.no_grad()
def round_in_place(
    model: PreTrainedModel, source: CheckpointFolder, state: Mapping[str, Tensor] | None = None
) -> None:
    """Rounds weights of a model to the type in which they will be stored.

    Args:
        model: The model.
        source: Folder of its original.
        state: A part of its weights by their names in the model; none takes all.
    """
    left_out = _not_stored(model)
    for key, tensor in (model.state_dict() if state is None else state).items():
        # Of tied weights one is stored, and its type counts for all.
        if key not in left_out:
            dtype = _type_on_disk(model, source, key, tensor)
            if dtype != tensor.dtype:
                tensor.copy_(tensor.to(dtype))


def _not_stored(model: PreTrainedModel) -> set[str]:
    """Names of tensors that a folder does without: each is another one, or never stored.

    On the meta device no tensor is another one for sure, so that the configuration's word counts.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    tied = [
        target
        for target, origin in model.all_tied_weights_keys.items()
        if target in named and origin in named and _are_tied(named[target], named[origin])
    ]
    return {*tied, *(model._keys_to_ignore_on_save or ())}


def _are_tied(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.is_meta and other.is_meta)


def _type_on_disk(
    model: PreTrainedModel, source: CheckpointFolder, key: str, tensor: Tensor
) -> torch.dtype:
    if not tensor.is_floating_point():
        return tensor.dtype
    return TORCH_TYPES.get(type_in_folder(model, source, key, tensor), tensor.dtype)


def type_in_folder(
    model: PreTrainedModel, source: CheckpointFolder, key: str, tensor: Tensor
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
