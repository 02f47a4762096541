"""What becomes of every expert: decided before any weight moves, readable, editable, checked."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_smoe.compression.strategy import from_spec, to_spec
from lightning_smoe.errors import InputError
from lightning_smoe.functional.alignment import Alignment
from lightning_smoe.functional.merging import Average, Merger
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import Grouping, RouterRepair, Slice
from lightning_smoe.models.artifact import Manifest, replacing, write_json
from lightning_smoe.models.layer import MoELayer

_SCHEMA = 1
_STRATEGIES = {"router": RouterRepair, "merger": Merger, "alignment": Alignment, "refit": Refit}
_KEYS = {"schema", "model", "layers", "manifest", *_STRATEGIES}


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What becomes of the experts of one layer.

    Args:
        name: The layer, such as `model.layers.3.mlp`.
        num_experts: Experts before.
        groups: Experts of each slot after; a pruned layer has one expert a slot.
        dropped: Experts that are in no slot.
        weights: Share of each expert in the slot it is in, at least 0; equal shares if none.
        super_experts: Experts of huge outputs that the planner left as they are; for the reader.
    """

    name: str
    num_experts: int
    groups: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...] = ()
    weights: Float64[Tensor, " experts"] | None = None
    super_experts: tuple[int, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether the layer stays as it is."""
        return self.groups == tuple((e,) for e in range(self.num_experts))

    @property
    def grouping(self) -> Grouping:
        """Slot and share of every expert."""
        assignment = torch.full((self.num_experts,), -1)
        for slot, members in enumerate(self.groups):
            assignment[list(members)] = slot
        weights = self.weights
        if weights is None:
            weights = torch.ones(self.num_experts, dtype=torch.float64)
        return Grouping(assignment, weights)

    def check(self, layer: MoELayer, router: RouterRepair) -> None:
        """Compares with the layer it is for.

        Args:
            layer: The layer.
            router: How the router will follow.

        Raises:
            InputError: The layer has another number of experts, an expert is in two places or in
                none, a slot is empty, a share is below 0, or the router needs more slots.
        """
        if layer.num_experts != self.num_experts:
            raise InputError(
                f"{self.name}: the plan is for {self.num_experts} experts and the model has "
                f"{layer.num_experts}; make a plan for this model"
            )
        placed = [*self.dropped, *(e for group in self.groups for e in group)]
        for expert in sorted({*placed, *range(self.num_experts)}):
            times = placed.count(expert)
            if times != 1 or not 0 <= expert < self.num_experts:
                raise InputError(
                    f"{self.name}: the plan names expert {expert} {times} times; name each of 0 to "
                    f"{self.num_experts - 1} once, in one group or in dropped"
                )
        if not all(self.groups):
            raise InputError(f"{self.name}: the plan has an empty group; remove it")
        shares = torch.ones(self.num_experts) if self.weights is None else self.weights
        if len(shares) != self.num_experts or not bool((shares >= 0).all()):
            raise InputError(
                f"{self.name}: plan.safetensors must give {self.num_experts} shares of 0 or more"
            )
        if router.keeps_all_rows:
            if self.dropped:
                raise InputError(
                    f"{self.name}: the plan drops experts {list(self.dropped)}, but under the "
                    f"router {type(router).__name__} every row needs a slot; put them in groups"
                )
            return
        if len(self.groups) < layer.top_k:
            raise InputError(
                f"{self.name}: the plan keeps {len(self.groups)} experts but the router selects "
                f"top_k={layer.top_k}; keep at least {layer.top_k}"
            )
        self._check_router_groups(layer)

    def _check_router_groups(self, layer: MoELayer) -> None:
        blocks = layer.num_router_groups
        if blocks == 1:
            return
        size, width = self.num_experts // blocks, len(self.groups) // blocks
        wrong = [
            g for i, g in enumerate(self.groups) if {e // size for e in g} != {i // max(width, 1)}
        ]
        if len(self.groups) % blocks or wrong or width < layer.min_experts_per_router_group:
            raise InputError(
                f"{self.name}: the router chooses among {blocks} equal blocks of experts; keep the "
                f"same number (at least {layer.min_experts_per_router_group}) in each block of "
                f"{size}, in order, and merge within blocks only"
            )


@dataclass(frozen=True, eq=False)
class CompressionPlan:
    """What becomes of a model's experts, and how it is carried out.

    Args:
        layers: The layers that change, first layer first; the others keep every bit.
        router: How the router's rows follow.
        merger: How the members of a slot become one expert.
        alignment: How the members' neurons are matched before they are merged; none leaves them.
        refit: Closed-form refit afterwards; none leaves it out.
        model: Fingerprint of the model the plan was made for; empty in a plan written by hand.
        manifest: What made the plan; none for a plan written by hand.
    """

    layers: tuple[LayerPlan, ...]
    router: RouterRepair = field(default_factory=Slice)
    merger: Merger = field(default_factory=Average)
    alignment: Alignment | None = None
    refit: Refit | None = None
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
        return self.refit is not None or self.router.needs_tokens

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
            save_file(weights, partial)
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
        except (KeyError, SafetensorError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} is not a plan ({type(error).__name__}: {error}); see "
                "lightning_smoe/compression/README.md for its keys"
            ) from error


def _read(stored: dict[str, Any], beside: Path) -> CompressionPlan:
    unknown = stored.keys() - _KEYS
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)}")
    weights = load_file(beside) if beside.exists() else {}
    weights = {name: shares.double() for name, shares in weights.items()}
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
