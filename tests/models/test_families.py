"""Every family: compressed in each way, saved, loaded again, and laid out as its original."""

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_smoe.compression.apply import apply_layer, finish
from lightning_smoe.compression.layer_plan import LayerPlan
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.recipe import check_router
from lightning_smoe.errors import InputError
from lightning_smoe.functional.router import (
    LogSumExp,
    RouterBatch,
    RouterRepair,
    RouterTokens,
    Slice,
)
from lightning_smoe.functional.router_rows import Map
from lightning_smoe.models.checkpoint import outline
from lightning_smoe.models.expert_count import COUNT_FIELDS
from lightning_smoe.models.folder import CheckpointFolder, open_checkpoint
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.refusals import REFUSED
from lightning_smoe.models.saving import save
from tests.families import ALL_FAMILIES, NUM_EXPERTS, build
from tests.models.pruning import CARD, MANIFEST

KEPT = 8
EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
# Sizes of tensors with an expert axis; Inkling's router has rows for two shared experts, too.
COUNTED = {NUM_EXPERTS: KEPT, NUM_EXPERTS + 2: KEPT + 2}
# Sums over experts and softmax run in another order; logits are of order 0.1.
ROUNDING = 1e-5
# What scripts/families.py reads of a test that is passed by a refusal.
REFUSED_WAY = "refused"
WAYS: dict[str, RouterRepair] = {"prune": Slice(), "lse": LogSumExp(), "map": Map()}


class Original:
    """A model of a family, and the folder it was saved in."""

    def __init__(self, family: str, folder: Path) -> None:
        self.model = build(family)
        self.model.save_pretrained(folder)
        self.folder = open_checkpoint(folder)


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    return Original(request.param, tmp_path_factory.mktemp("original") / "model")


def groups(layer: MoELayer, merges: bool) -> tuple[tuple[int, ...], ...]:
    """The last experts of each router group, alone or with those that are not kept."""
    found: list[tuple[int, ...]] = []
    for block in torch.arange(NUM_EXPERTS).view(layer.num_router_groups, -1).tolist():
        lost = NUM_EXPERTS - KEPT
        rest, kept = (
            block[: lost // layer.num_router_groups],
            block[lost // layer.num_router_groups :],
        )
        extra: list[tuple[int, ...]] = [(expert,) for expert in rest] if merges else []
        extra += [()] * (len(kept) - len(extra))
        found += [(*more, expert) for expert, more in zip(kept, extra, strict=True)]
    return tuple(found)


@torch.no_grad()
def what_routers_do(model: PreTrainedModel, tokens: Tensor) -> list[RouterTokens]:
    """What the rows of each layer multiply, and the logits."""
    seen: list[tuple[Tensor, Tensor]] = []
    layers = find_moe_layers(model)
    hooks = [
        layer.router.register_forward_hook(
            lambda _, args, output, layer=layer: seen.append(
                (args[0].flatten(0, -2), layer.router_logits(output))
            )
        )
        for layer in layers
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return [
        RouterTokens([RouterBatch(states, logits, logits)], lambda tensor: tensor)
        for states, logits in seen
    ]


def compress(model: PreTrainedModel, router: RouterRepair, tokens: Tensor) -> None:
    merges = not isinstance(router, Slice)
    evidence = what_routers_do(model, tokens)
    for layer, found in zip(find_moe_layers(model), evidence, strict=True):
        kept = groups(layer, merges)
        dropped = set(range(NUM_EXPERTS)).difference(*kept)
        layer_plan = LayerPlan(layer.name, NUM_EXPERTS, kept, tuple(sorted(dropped)))
        plan = CompressionPlan((layer_plan,), router)
        layer_plan.check(layer, router)
        apply_layer(layer, layer_plan, plan, tokens=found)
    finish(model)


def layout(tensors: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    return {key: (entry["dtype"], entry["shape"]) for key, entry in tensors.items()}


def expected_layout(original: Original, way: str) -> dict[str, tuple[str, list[int]]]:
    """The original's keys, types and sizes for fewer experts (and, in a map, as many rows)."""
    expected: dict[str, tuple[str, list[int]]] = {}
    for key, (dtype, shape) in layout(original.folder.tensors).items():
        number = EXPERT.search(key)
        if number is None:
            is_expert = len(shape) == 3 or (len(shape) == 2 and "experts." in key)
            counted = COUNTED if is_expert or way != "map" else {}
            expected[key] = (dtype, [counted.get(size, size) for size in shape])
        elif int(number.group()) < KEPT:
            expected[key] = (dtype, shape)
    return expected


@pytest.mark.parametrize("way", WAYS)
def test_a_family_is_compressed_saved_and_laid_out_as_its_original(
    way: str,
    original: Original,
    tokens: Tensor,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    model, target = copy.deepcopy(original.model), tmp_path / "saved"
    layers = find_moe_layers(model)
    if WAYS[way].needs_tokens and layers[0].router_reads_apart:
        record_property(REFUSED_WAY, "the router reads apart from the experts")
        with pytest.raises(InputError, match=r"LogSumExp is fitted on what the experts read, and"):
            check_router(WAYS[way], model, layers)
        return
    check_router(WAYS[way], model, layers)
    compress(model, WAYS[way], tokens)
    # This loads the folder again, and raises unless weights and logits are the same bits.
    save(model, original.folder, target, manifest=MANIFEST, card=CARD)
    found = layout(open_checkpoint(target).tensors)
    maps = {key: found.pop(key) for key in list(found) if key.endswith(".experts.expert_map")}
    assert found == expected_layout(original, way)
    assert {layer.num_experts for layer in layers} == {KEPT}
    assert list(maps.values()) == [("I64", [NUM_EXPERTS])] * (len(layers) if way == "map" else 0)


@torch.no_grad()
@pytest.mark.parametrize("shares", [False, True], ids=["rows follow", "map"])
def test_the_order_of_experts_means_nothing_if_their_rows_or_the_map_follow(
    shares: bool, original: Original, tokens: Tensor
) -> None:
    model = copy.deepcopy(original.model)
    before = model(tokens).logits
    for layer in find_moe_layers(model):
        within = torch.arange(NUM_EXPERTS).view(layer.num_router_groups, -1)
        order = within.flip(1).roll(1, 1).flatten()
        if shares:
            layer.share(layer.weights().select(order), order.argsort())
        else:
            layer.select(order)
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=ROUNDING)


def names_a_count(config_class: Any) -> bool:
    """Says whether a configuration, or one that is part of it, has a field of routed experts."""
    named = {field.name for field in dataclasses.fields(config_class)}
    part_classes = [
        part for part in config_class.sub_configs.values() if dataclasses.is_dataclass(part)
    ]
    return bool(named & {*COUNT_FIELDS}) or any(map(names_a_count, part_classes))


def test_no_family_of_transformers_is_left_out() -> None:
    families = [f for f in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if names_a_count(CONFIG_MAPPING[f])]
    assert len(families) > len(REFUSED)
    assert set(families) - ALL_FAMILIES.keys() - REFUSED.keys() == set()
    assert not ALL_FAMILIES.keys() & REFUSED.keys()


@pytest.mark.parametrize("family", [family for family in REFUSED if family in CONFIG_MAPPING])
def test_what_cannot_be_compressed_is_refused_with_its_reason_before_weights_are_read(
    family: str, tmp_path: Path
) -> None:
    # Of a folder without weights.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    message = re.escape(f"{family} cannot be compressed: {REFUSED[family]}")
    with pytest.raises(InputError, match=message):
        outline(CheckpointFolder(tmp_path))
