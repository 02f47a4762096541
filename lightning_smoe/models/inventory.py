"""Whether the files of a checkpoint folder hold what its configuration needs; loads no model."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lightning_smoe.models.artifact import sha256_of_file
from lightning_smoe.models.checkpoint import outline
from lightning_smoe.models.expert_count import text_config
from lightning_smoe.models.folder import CheckpointFolder
from lightning_smoe.models.tensor_reader import TensorReader

_INDEX = "model.safetensors.index.json"
_PREDICTS_AHEAD = re.compile(r"(^|\.)mtp(\.|_|$)")
# Of checkpoints older than transformers 4.31, which computes it.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Check:
    """What one look at a folder found.

    Args:
        name: What was looked at.
        says: What was found, for a person.
        wrong: What is not as it has to be, a line each.
    """

    name: str
    says: str
    wrong: tuple[str, ...] = ()


def stored_as(model: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
    """What each tensor of a model on the meta device is stored as: keys of files, and outlines."""
    return {
        key: revert_weight_conversion(model, {key: tensor})
        for key, tensor in model.state_dict(keep_vars=True).items()
    }


def check_tensors(folder: CheckpointFolder) -> Check:
    """Compares keys, shapes and kinds of the stored tensors with what the configuration needs.

    Raises:
        InputError: The configuration is not understood.
    """
    model = outline(folder)
    found, places = folder.tensors, stored_as(model)
    own = model.state_dict(keep_vars=True)
    # Files of transformers' own layout, in which a module's tensor is stored under its own name.
    places = {k: {k: own[k]} if k in found else stored for k, stored in places.items()}
    needed = {key: tensor for stored in places.values() for key, tensor in stored.items()}
    tied = _tied(own, places, found)
    missing = [key for key in needed if key not in found and key not in tied]
    wrong = [f"{key} is missing" for key in missing]
    wrong += [w for key in needed.keys() & found.keys() for w in _unlike(key, needed, found)]
    extra = sorted(found.keys() - needed.keys())
    ahead = [key for key in extra if _predicts_ahead(key, model)]
    unknown = [k for k in extra if k not in ahead and not _is_ignored(k, model)]
    wrong += [f"{key} is not known to the configuration" for key in unknown]
    says = f"{len(needed) - len(missing) - len(tied)} of {len(needed) - len(tied)} that are needed"
    if ahead:
        says += f"; {len(ahead)} more predict several tokens ahead (MTP) and are not loaded"
    if len(extra) > len(ahead) + len(unknown):
        says += f"; {len(extra) - len(ahead) - len(unknown)} more are computed, not loaded"
    return Check("tensors", says, tuple(sorted(wrong)))


def _tied(
    own: Mapping[str, Tensor],
    places: Mapping[str, Mapping[str, Tensor]],
    found: Mapping[str, Any],
) -> set[str]:
    """Keys that need not be stored, because the same parameter is stored under another."""
    names: dict[int, list[str]] = {}
    for key, tensor in own.items():
        names.setdefault(id(tensor), []).append(key)
    tied: set[str] = set()
    for same in names.values():
        if any(places[key].keys() <= found.keys() for key in same):
            tied |= {k for key in same for k in places[key] if k not in found}
    return tied


def _unlike(
    key: str, needed: Mapping[str, Tensor], found: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    shape, wanted = list(found[key]["shape"]), list(needed[key].shape)
    if shape != wanted:
        yield f"{key} has shape {shape} where the configuration needs {wanted}"
    kind = str(found[key]["dtype"])
    if needed[key].is_floating_point() != kind.startswith(("F", "BF")):
        yield f"{key} is of type {kind} where the model has {needed[key].dtype}"


def _predicts_ahead(key: str, model: PreTrainedModel) -> bool:
    layer = _LAYER.search(key)
    # Any: the field is that of every language model, but no class declares it.
    config: Any = text_config(model.config)
    beyond = layer is not None and int(layer.group(1)) >= config.num_hidden_layers
    return beyond or _PREDICTS_AHEAD.search(key) is not None


def _is_ignored(key: str, model: PreTrainedModel) -> bool:
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(p, key) for p in patterns) or _COMPUTED.search(key) is not None


def check_index(folder: CheckpointFolder, stored: TensorReader) -> Check:
    """Compares the index with what the shards hold."""
    wrong = [f"{key} is stored twice" for key in stored.twice]
    unused = sorted({p.name for p in folder.path.glob("*.safetensors")} - stored.files)
    beside = f"; {', '.join(unused)} not used" if unused else ""
    if stored.files == {"model.safetensors"}:
        return Check("index", f"not needed: one file{beside}", tuple(wrong))
    text = (folder.path / _INDEX).read_text(encoding="utf-8")
    named: dict[str, str] = json.loads(text)["weight_map"]
    for key in sorted(named.keys() | stored.places.keys()):
        place = stored.places.get(key)
        if place is None:
            wrong.append(f"{key} is not in {named[key]}, where {_INDEX} has it")
        elif key not in named:
            wrong.append(f"{key} of {place.name} is not in {_INDEX}")
        elif named[key] != place.name:
            wrong.append(f"{key} is in {place.name} where {_INDEX} names {named[key]}")
    return Check(
        "index", f"{len(named)} tensors in {len(stored.files)} files{beside}", tuple(wrong)
    )


def check_hashes(folder: CheckpointFolder, advance: Advance) -> Check:
    """Compares every file with the hash that was noted when it was written.

    Args:
        folder: The folder.
        advance: Told the size of every file that was read, in bytes.
    """
    noted: Any = folder.manifest.get("files")
    if noted is None:
        return Check("hashes", "none are noted: not a folder of this project, or an older one")
    if not isinstance(noted, dict):
        return Check("hashes", "damaged", ("smoe.json: `files` is not an object",))
    wrong = []
    for name, digest in sorted(noted.items()):
        path = folder.path / name
        if not path.is_file():
            wrong.append(f"{name} is not there")
        elif sha256_of_file(path) != digest:
            wrong.append(f"{name} is not the file that was written: its hash is another")
        if path.is_file():
            advance(path.stat().st_size)
    return Check("hashes", f"{len(noted) - len(wrong)} of {len(noted)} files", tuple(wrong))


def check_finite(stored: TensorReader, advance: Advance) -> Check:
    """Counts numbers that are none (NaN) or infinite, one tensor in memory at a time.

    Args:
        stored: The tensors.
        advance: Told the size of every piece that was read, in bytes.
    """
    wrong, count = [], 0
    for key in stored.places:
        found = _count_bad(stored.pieces(key), advance)
        count += 1
        if any(found):
            wrong.append(f"{key} holds {found[0]} NaN and {found[1]} infinite numbers")
    return Check("numbers", f"{count - len(wrong)} of {count} tensors are finite", tuple(wrong))


def _count_bad(pieces: Iterable[Tensor], advance: Advance) -> tuple[int, int]:
    nan = infinite = 0
    for piece in pieces:
        advance(piece.numel() * piece.element_size())
        if not piece.is_floating_point():
            continue
        # Types of one byte know neither question.
        wide = piece if piece.element_size() > 1 else piece.float()
        if not bool(torch.isfinite(wide).all()):
            nan += int(wide.isnan().sum())
            infinite += int(wide.isinf().sum())
    return nan, infinite
