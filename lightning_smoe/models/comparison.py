"""How the files of a compressed checkpoint differ from its original's; loads no model."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_smoe.errors import InputError
from lightning_smoe.models.checkpoint import outline
from lightning_smoe.models.difference import Difference
from lightning_smoe.models.folder import CheckpointFolder
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.modeling_smoe import TYPE_PREFIX
from lightning_smoe.models.origins import LayerOrigin, Side, find_origins
from lightning_smoe.models.parts import PARTS, parameters_of_parts
from lightning_smoe.models.tensor_reader import TensorReader

# Characters of an entry of config.json that are shown.
_LONGEST = 60


@dataclass(frozen=True)
class Comparison:
    """How a checkpoint differs from its original.

    Args:
        roles: Differences of tensors by what they are; experts are compared with their origins.
        layers: Where experts come from, first layer first.
        left_out: Tensors of the original that are neither experts' nor in the checkpoint.
    """

    roles: Mapping[str, Difference]
    layers: tuple[LayerOrigin, ...]
    left_out: tuple[str, ...]


def check_comparable(folder: CheckpointFolder, original: CheckpointFolder) -> None:
    """Checks, without a look at weights, that one may have been made from the other.

    Raises:
        InputError: They are of different families, or have other layers.
    """
    pair = folder, original
    families = [each.model_type.removeprefix(TYPE_PREFIX) for each in pair]
    names = [[layer.name for layer in find_moe_layers(outline(each))] for each in pair]
    if families[0] != families[1] or names[0] != names[1]:
        raise InputError(
            f"--original {original.path} ({families[1]}, {len(names[1])} layers with experts) is "
            f"not what {folder.path} ({families[0]}, {len(names[0])}) was made from; name its "
            "original"
        )


def compare_folders(
    folder: CheckpointFolder, original: CheckpointFolder, advance: Callable[[int], object]
) -> Comparison:
    """Compares every tensor of a folder with its original's, a few in memory at a time.

    Args:
        folder: The checkpoint.
        original: What it was made from.
        advance: Told the size of every tensor that was read of the checkpoint, in bytes.

    Raises:
        InputError: They are of different families, or have other layers.
    """
    check_comparable(folder, original)
    with TensorReader(folder) as ours, TensorReader(original) as theirs:
        new, old = Side(folder, ours), Side(original, theirs)
        roles: dict[str, Difference] = {}
        layers = []
        for layer, source in zip(new.layers, old.layers, strict=True):
            difference = roles.setdefault("experts", Difference())
            layers.append(find_origins((new, layer), (old, source), difference, advance))
        in_experts = new.keys_of_experts | old.keys_of_experts
        role_of = _roles(new)
        for key in sorted(ours.places.keys() - in_experts):
            found = ours.read(key)
            wanted = theirs.read(key) if key in theirs.places else None
            roles.setdefault(role_of.get(key, "other"), Difference()).add(found, wanted)
            advance(found.numel() * found.element_size())
        left_out = sorted(theirs.places.keys() - ours.places.keys() - in_experts)
    return Comparison(roles, tuple(layers), tuple(left_out))


def _roles(side: Side) -> dict[str, str]:
    """The part of every stored tensor that is in one."""
    parts = parameters_of_parts(side.model)
    found: dict[str, str] = {}
    for part in PARTS:
        for name in parts[part] if part not in ("all", "down_proj") else ():
            found |= dict.fromkeys(side.keys[name], str(part))
    return found


def config_differences(folder: CheckpointFolder, original: CheckpointFolder) -> list[str]:
    """Entries of config.json that are not the original's, a line each."""
    new, old = folder.config, original.config
    return [
        f"{key}: {_short(old, key)} -> {_short(new, key)}"
        for key in sorted(new.keys() | old.keys())
        if new.get(key) != old.get(key) or (key in new) != (key in old)
    ]


def _short(config: Mapping[str, Any], key: str) -> str:
    if key not in config:
        return "not there"
    text = json.dumps(config[key])
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def file_differences(folder: CheckpointFolder, original: CheckpointFolder) -> dict[str, str]:
    """What became of the original's other files (tokenizer, chat template, ...), by name."""
    return {
        path.name: "not there"
        if not (there := folder.path / path.name).is_file()
        else "equal"
        if there.read_bytes() == path.read_bytes()
        else "changed"
        for path in original.other_files
    }
