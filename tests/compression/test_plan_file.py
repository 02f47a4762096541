"""Plans on disk: there and back, written by hand, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.errors import InputError
from lightning_smoe.functional.alignment import ByActivations, ByWeights
from lightning_smoe.functional.merging import Average, UnionSVD
from lightning_smoe.functional.pooling import NeuronPool
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import LogSumExp, Slice
from lightning_smoe.functional.router_rows import Map
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.layer import find_moe_layers
from tests.compression.plans import NAME, layer_plan, pairs, whole_plan
from tests.families import build

FUNCTIONAL = "lightning_smoe.functional"


def assert_same_plan(actual: CompressionPlan, expected: CompressionPlan) -> None:
    for ours, theirs in zip(actual.layers, expected.layers, strict=True):
        assert replace(ours, weights=None).__dict__ == replace(theirs, weights=None).__dict__
        assert (ours.weights is None) == (theirs.weights is None)
        if ours.weights is not None and theirs.weights is not None:
            torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=0)
    names = ("router", "merger", "alignment", "refit", "model", "manifest")
    assert all(getattr(actual, name) == getattr(expected, name) for name in names)


@pytest.mark.parametrize(
    "plan",
    [
        whole_plan(),
        replace(
            whole_plan(),
            router=LogSumExp(0.5),
            merger=UnionSVD(rank=3),
            alignment=ByActivations(),
            refit=Refit(0.7),
            model="abc",
            manifest=Manifest("plan", {"keep": 6}, {"torch": "2"}),
        ),
        CompressionPlan((layer_plan([[3], [5]], [0, 1, 2, 4, *range(6, 12)]),)),
        CompressionPlan(
            (replace(layer_plan([[3], [5], [0, 1, 2, 4, *range(6, 12)]]), super_experts=(3, 5)),),
            Map(),
            NeuronPool("energy", rescale=False),
            None,
            Refit(correct_drift=False),
        ),
    ],
    ids=["defaults", "everything set", "pruned", "pooled"],
)
def test_a_plan_survives_saving_and_saves_the_same_bytes(
    plan: CompressionPlan, tmp_path: Path
) -> None:
    files = [tmp_path / folder / "plan.json" for folder in ("first", "second")]
    plan.save(files[0])
    loaded = CompressionPlan.load(files[0])
    assert_same_plan(loaded, plan)
    loaded.save(files[1])
    for suffix in (".json", ".safetensors"):
        written = [file.with_suffix(suffix).read_bytes() for file in files]
        assert written[0] == written[1]


def test_the_keys_of_a_plan_are_those_of_its_readme(tmp_path: Path) -> None:
    layers = (replace(layer_plan(pairs()), super_experts=(3,)), layer_plan(pairs()))
    CompressionPlan(layers, alignment=ByWeights()).save(tmp_path / "plan.json")
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert [*stored] == [
        "schema",
        "model",
        "router",
        "merger",
        "alignment",
        "refit",
        "scale",
        "layers",
    ]
    assert [*stored["layers"][1]] == ["name", "num_experts", "groups", "dropped"]
    assert stored["layers"][0]["super_experts"] == [3]
    assert stored["alignment"] == {
        "class_path": f"{FUNCTIONAL}.alignment.ByWeights",
        "init_args": {},
    }
    assert stored["refit"] is None


def test_a_plan_written_by_hand_needs_names_counts_and_groups_only(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    groups = [[0, 1, 2], [3], [4, 5, 6, 7, 8, 9, 10]]
    layer = {"name": NAME, "num_experts": 12, "groups": groups, "dropped": [11]}
    path.write_text(json.dumps({"layers": [layer]}))
    plan = CompressionPlan.load(path)
    plan.check(find_moe_layers(build("mixtral")), "any model")
    found = (plan.router, plan.merger, plan.alignment, plan.refit)
    assert found == (Slice(), Average(), None, None)
    assert plan.layers[0].super_experts == ()
    assert plan.manifest is None
    mixing = plan.layers[0].grouping.mixing()
    for slot, members in enumerate(groups):
        for expert in range(12):
            share = 1 / len(members) if expert in members else 0
            assert mixing[slot, expert].item() == pytest.approx(share)


LAYER: dict[str, Any] = {"name": NAME, "num_experts": 12, "groups": [[0, 1]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSONDecodeError"),
        ("", "JSONDecodeError"),
        ("[]", "Type(Check)?Error"),
        ("{}", "KeyError: 'layers'"),
        ('{"layers": 3}', "TypeError"),
        *[
            (json.dumps({"layers": [{k: v for k, v in LAYER.items() if k != key}]}), key)
            for key in LAYER
        ],
        (json.dumps({"layers": [LAYER | {"groups": 3}]}), "TypeError"),
        (json.dumps({"layers": [LAYER | {"groups": [["a"]]}]}), "ValueError"),
        (json.dumps({"layers": [LAYER | {"num_experts": "many"}]}), "ValueError"),
        (json.dumps({"layers": [LAYER], "manifest": {"step": "plan"}}), "manifest needs step, inp"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"(?s)is not a plan .*{message}.* see .*README\.md"):
        CompressionPlan.load(path)


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        ({"router": "Slice"}, "does not describe a RouterRepair"),
        ({"merger": {"class_path": f"{FUNCTIONAL}.router.Slice"}}, "is not a Merger"),
        ({"alignment": {"class_path": f"{FUNCTIONAL}.merging.Average"}}, "is not a Alignment"),
        ({"refit": {"init_args": {"strength": 1}}}, "does not describe a Refit"),
    ],
)
def test_a_plan_with_an_unknown_strategy_is_refused(
    strategies: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"layers": [LAYER], **strategies}))
    with pytest.raises(InputError, match=message):
        CompressionPlan.load(path)


def test_damaged_shares_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    whole_plan().save(path)
    beside = path.with_suffix(".safetensors")
    beside.write_bytes(beside.read_bytes()[:20])
    with pytest.raises(InputError, match=r"is not a plan .SafetensorError"):
        CompressionPlan.load(path)


def test_shares_of_any_float_type_are_read_as_float64(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"layers": [LAYER]}))
    save_file({NAME: torch.full((12,), 0.5)}, path.with_suffix(".safetensors"))
    weights = CompressionPlan.load(path).layers[0].weights
    assert weights is not None
    torch.testing.assert_close(weights, torch.full((12,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("key", ["rotuer", "align"])
def test_a_key_that_is_not_known_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({key: None, "layers": []}))
    with pytest.raises(InputError, match=rf"unknown keys \['{key}'\]"):
        CompressionPlan.load(path)
