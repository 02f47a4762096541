"""What becomes of every expert: decided before any weight moves, readable, editable, checked."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_smoe.compression.layer_plan import LayerPlan
from lightning_smoe.compression.strategy import from_spec, to_spec
from lightning_smoe.errors import InputError
from lightning_smoe.functional.alignment import Alignment
from lightning_smoe.functional.merging import Average, Merger
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import RouterRepair, Slice
from lightning_smoe.functional.scale import ScaleRepair
from lightning_smoe.models.artifact import Manifest, replacing, sha256_of_tensors, write_json
from lightning_smoe.models.layer import MoELayer

_SCHEMA = 1
_STRATEGIES = {
    "router": RouterRepair,
    "merger": Merger,
    "alignment": Alignment,
    "refit": Refit,
    "scale": ScaleRepair,
}
_REFITS = "refits"
_HASH = "sha256"
# What reading a plan raises where the file holds something else.
_NO_PLAN = (
    AttributeError,
    KeyError,
    OverflowError,
    RecursionError,
    SafetensorError,
    TypeError,
    ValueError,
)
_KEYS = {"schema", "model", "layers", "manifest", _REFITS, *_STRATEGIES}


@dataclass(frozen=True, eq=False)
class CompressionPlan:
    """What becomes of a model's experts, and how it is carried out.

    Args:
        layers: The layers that change, first layer first; the others keep every bit.
        router: How the router's rows follow.
        merger: How the members of a slot become one expert.
        alignment: How the members' neurons are matched before they are merged; none leaves them.
        refit: Closed-form refit afterwards; none leaves it out.
        scale: One number a layer that gives the routed output its size back; none leaves it out.
        model: Fingerprint of the model the plan was made for; empty in a plan written by hand.
        manifest: What made the plan; none for a plan written by hand.
    """

    layers: tuple[LayerPlan, ...]
    router: RouterRepair = field(default_factory=Slice)
    merger: Merger = field(default_factory=Average)
    alignment: Alignment | None = None
    refit: Refit | None = None
    scale: ScaleRepair | None = None
    model: str = ""
    manifest: Manifest | None = None

    @staticmethod
    def identity(layers: Sequence[MoELayer]) -> "CompressionPlan":
        """The plan that changes nothing."""
        counts = {layer.name: layer.num_experts for layer in layers}
        plans = (LayerPlan(n, c, tuple((e,) for e in range(c))) for n, c in counts.items())
        return CompressionPlan(tuple(plans))

    @property
    def reads_tokens(self) -> bool:
        """Whether carrying it out reads calibration text."""
        return self.refit is not None or self.scale is not None or self.router.needs_tokens

    @property
    def needs_sample(self) -> bool:
        """Whether carrying it out looks at the sample of tokens in the statistics."""
        return self.merger.needs_tokens or (
            self.alignment is not None and self.alignment.needs_tokens
        )

    def by_name(self) -> dict[str, LayerPlan]:
        """The layers' plans by name, without those that change nothing."""
        return {layer.name: layer for layer in self.layers if not layer.is_identity}

    def check(self, layers: Sequence[MoELayer], fingerprint: str) -> None:
        """Compares with the model it is to change, before work is spent.

        Raises:
            InputError: The plan is for another model, or not valid; see `LayerPlan.check`.
        """
        if self.model and self.model != fingerprint:
            raise InputError(
                "plan.json was made for another model; plan again with model.overwrite true, "
                "or remove its key 'model' to use it here all the same"
            )
        there = {layer.name: layer for layer in layers}
        names = [layer.name for layer in self.layers]
        for name in names:
            if name not in there or names.count(name) > 1:
                raise InputError(
                    f"plan.json names {name!r} {names.count(name)} times; the model's expert "
                    f"layers are {', '.join(there)}"
                )
        for layer in self.layers:
            layer.check(there[layer.name], self.router)

    def save(self, path: Path) -> None:
        """Writes `plan.json`, and the shares beside it as `plan.safetensors`."""
        weights = {p.name: p.weights for p in self.layers if p.weights is not None}
        with replacing(path.with_suffix(".safetensors")) as partial:
            save_file(weights, partial, metadata={_HASH: sha256_of_tensors(weights)})
        layers = [
            {
                "name": layer.name,
                "num_experts": layer.num_experts,
                "groups": [list(group) for group in layer.groups],
                "dropped": list(layer.dropped),
                **({"super_experts": list(layer.super_experts)} if layer.super_experts else {}),
            }
            for layer in self.layers
        ]
        settings = {k: to_spec(getattr(self, k)) for k in _STRATEGIES}
        stored = {"schema": _SCHEMA, "model": self.model, **settings}
        manifest = {} if self.manifest is None else {"manifest": self.manifest.to_json()}
        write_json(path, {**stored, "layers": layers, **manifest})

    @staticmethod
    def load(path: Path) -> "CompressionPlan":
        """Reads a plan, written by `save` or by hand.

        Raises:
            InputError: It is not JSON, a key is missing or wrong, or its shares are damaged.
        """
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return _read(stored, path.with_suffix(".safetensors"))
        except _NO_PLAN as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} is not a plan ({type(error).__name__}: {error}); see "
                "lightning_smoe/compression/README.md for its keys"
            ) from error


def decisions(path: Path) -> dict[str, Any]:
    """What a plan.json decides, without what made it and what came of it."""
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in stored.items() if key not in ("manifest", _REFITS)}


def note_refits(path: Path, refits: dict[str, dict[str, Any]]) -> None:
    """Writes into a plan.json what came of the refit of each layer, by the layer's name."""
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    noted = {_REFITS: refits} if refits else {}
    if stored.get(_REFITS, {}) != refits:
        write_json(path, {**{k: v for k, v in stored.items() if k != _REFITS}, **noted})


def _read_shares(beside: Path) -> dict[str, Tensor]:
    """The shares in plan.safetensors, which a person may have written, without a hash."""
    if not beside.exists():
        return {}
    with safe_open(beside, "pt") as file:
        shares = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        noted = (file.metadata() or {}).get(_HASH)
    if noted is not None and noted != sha256_of_tensors(shares):
        raise InputError(
            f"{beside} is not as it was written: its hash is another; delete plan.json and "
            "plan.safetensors to plan again, or write shares of your own without a hash"
        )
    return shares


def _read(stored: dict[str, Any], beside: Path) -> CompressionPlan:
    unknown = stored.keys() - _KEYS
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)}")
    texts = [stored.get("model", ""), *(layer["name"] for layer in stored["layers"])]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("model and the names of layers must be text")
    weights = {name: shares.double() for name, shares in _read_shares(beside).items()}
    layers = tuple(
        LayerPlan(
            layer["name"],
            int(layer["num_experts"]),
            tuple(tuple(int(e) for e in group) for group in layer["groups"]),
            tuple(int(e) for e in layer.get("dropped", [])),
            weights.get(layer["name"]),
            tuple(int(e) for e in layer.get("super_experts", [])),
        )
        for layer in stored["layers"]
    )
    built: dict[str, Any] = {
        k: from_spec(stored[k], kind) for k, kind in _STRATEGIES.items() if stored.get(k)
    }
    return CompressionPlan(
        layers,
        **built,
        model=stored.get("model", ""),
        manifest=Manifest.from_json(stored.get("manifest")),
    )
