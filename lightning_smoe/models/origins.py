"""Which expert of the original each expert of a compressed checkpoint is, by its bits."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.models.checkpoint import outline
from lightning_smoe.models.difference import Difference, as_bytes, same_bits
from lightning_smoe.models.folder import CheckpointFolder
from lightning_smoe.models.inventory import stored_as
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.tensor_reader import TensorReader

_NUMBERED = re.compile(r"experts\.(\d+)\.(.*)")

# Keys of files by the name of a part of an expert, for each expert; a row where one holds all.
_Places = list[dict[str, tuple[str, int | None]]]


@dataclass
class Side:
    """One of two folders that are compared, with what its tensors belong to.

    Args:
        folder: The folder.
        stored: Its tensors.

    Attributes:
        model: Its model on the meta device.
        layers: The model's layers with experts.
        keys: What each tensor of the model is stored as.
    """

    folder: CheckpointFolder
    stored: TensorReader
    model: PreTrainedModel = field(init=False)
    layers: list[MoELayer] = field(init=False)
    keys: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.model = outline(self.folder)
        self.layers = find_moe_layers(self.model)
        named = stored_as(self.model)
        self.keys = {k: [k] if k in self.stored.places else [*named[k]] for k in named}

    def expert_places(self, layer: MoELayer) -> _Places:
        """Where each expert's tensors lie in the files."""
        places: _Places = [{} for _ in range(layer.num_experts)]
        for parameter, _ in layer.experts.named_parameters():
            for key in self.keys[f"{layer.name}.experts.{parameter}"]:
                numbered = _NUMBERED.search(key)
                if numbered is not None:
                    places[int(numbered.group(1))][numbered.group(2)] = (key, None)
                    continue
                name = ".".join(key.split(".")[-2:]).removeprefix("experts.")
                for expert, place in enumerate(places):
                    place[name] = (key, expert)
        return places

    def matrices(self, layer: MoELayer) -> dict[tuple[str, bytes], list[int]]:
        """The experts that have a matrix, by its name and the hash of its bits."""
        found: dict[tuple[str, bytes], list[int]] = {}
        for expert, places in enumerate(self.expert_places(layer)):
            for name, place in places.items():
                tensor = self.read(place)
                if _is_telling(tensor):
                    found.setdefault((name, _digest(tensor)), []).append(expert)
        return found

    @property
    def keys_of_experts(self) -> set[str]:
        """Keys of all tensors of routed experts."""
        places = [place for layer in self.layers for place in self.expert_places(layer)]
        return {key for place in places for key, _ in place.values()}

    def read(self, place: tuple[str, int | None]) -> Tensor:
        """One tensor of an expert."""
        key, row = place
        return self.stored.read(key) if row is None else self.stored.read_row(key, row)

    def router_rows(self, layer: MoELayer) -> Tensor:
        """The rows that router states are multiplied with."""
        names = {id(module): name for name, module in self.model.named_modules()}
        tensor = next(t for t in layer.router_tensors if t.kind == "weight")
        (key,) = self.keys[f"{names[id(tensor.owner)]}.{tensor.attribute}"]
        return self.stored.read(key).movedim(tensor.axis, 0)


@dataclass(frozen=True)
class LayerOrigin:
    """Where the experts of one layer come from.

    Args:
        name: The layer.
        num_experts: Experts of the original.
        origins: For each expert, the expert of the original that it shares tensors with bit for
            bit; none for one that was merged, or changed throughout.
        changed: For each expert with an origin, the tensors that differ from it.
        rows_kept: Router rows equal to those of the expert's origin, bit for bit.
        num_rows: Router rows.
    """

    name: str
    num_experts: int
    origins: tuple[int | None, ...]
    changed: tuple[tuple[str, ...], ...]
    rows_kept: int
    num_rows: int

    @property
    def is_untouched(self) -> bool:
        """Whether every expert and router row is the original's, in its place."""
        in_place = self.origins == tuple(range(self.num_experts))
        return in_place and not any(self.changed) and self.rows_kept == self.num_experts


def find_origins(
    ours: tuple[Side, MoELayer],
    theirs: tuple[Side, MoELayer],
    difference: Difference,
    advance: Callable[[int], object],
) -> LayerOrigin:
    """Finds where the experts of one layer come from, one expert in memory at a time.

    Args:
        ours: The checkpoint and its layer.
        theirs: The original and its layer.
        difference: Told how each tensor differs from the one of the expert's origin, or, where
            there is none and the layer has as many experts, from the one in its place.
        advance: Told the size of every expert that was read, in bytes.
    """
    (new, layer), (old, source) = ours, theirs
    there, known = old.expert_places(source), old.matrices(source)
    origins: list[int | None] = []
    changed: list[tuple[str, ...]] = []
    for expert, places in enumerate(new.expert_places(layer)):
        read = {name: new.read(place) for name, place in places.items()}
        advance(sum(t.numel() * t.element_size() for t in read.values()))
        origin = _origin(expert, read, known)
        # Without an origin, an expert of as many is compared with the one in its place.
        beside = expert if origin is None and layer.num_experts == source.num_experts else origin
        differing = []
        for name, tensor in read.items():
            wanted = None if beside is None else old.read(there[beside][name])
            if not difference.add(tensor, wanted):
                differing.append(name)
        origins.append(origin)
        changed.append(tuple(differing) if origin is not None else ())
    kept, rows = _rows_kept(new.router_rows(layer), old.router_rows(source), origins)
    return LayerOrigin(layer.name, source.num_experts, tuple(origins), tuple(changed), kept, rows)


def _origin(
    expert: int, read: Mapping[str, Tensor], known: Mapping[tuple[str, bytes], list[int]]
) -> int | None:
    """The original's expert that most of an expert's numbers are equal to, if there is one."""
    votes: Counter[int] = Counter()
    for name, tensor in read.items():
        for candidate in known.get((name, _digest(tensor)), []) if _is_telling(tensor) else []:
            votes[candidate] += tensor.numel()
    if not votes:
        return None
    most = max(votes.values())
    best = sorted(candidate for candidate, count in votes.items() if count == most)
    return expert if expert in best else best[0]


def _rows_kept(found: Tensor, before: Tensor, origins: list[int | None]) -> tuple[int, int]:
    """Router rows that are those of their expert's origin, and how many there are."""
    # Where rows share experts they are all there, each in its place.
    wanted = origins if len(origins) == len(found) else range(len(found))
    pairs = zip(found, wanted, strict=True)
    kept = sum(o is not None and same_bits(row, before[o]) for row, o in pairs)
    return kept, len(found)


def _is_telling(tensor: Tensor) -> bool:
    """Whether a tensor tells an expert: biases do not, which may all be zero."""
    return tensor.dim() > 1


def _digest(tensor: Tensor) -> bytes:
    return hashlib.blake2b(as_bytes(tensor).numpy().data, digest_size=16).digest()
