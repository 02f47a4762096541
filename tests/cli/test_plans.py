"""Plans that a person edited or wrote."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.cli.command import Workplace, hash_of

LAYERS = ("model.layers.0.mlp", "model.layers.2.mlp")


def read(path: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(path.read_text())
    return stored


def by_hand(**changes: Any) -> dict[str, Any]:
    """A plan written from scratch: the even experts, in pairs the other way round."""
    kept = [[10], [8], [6], [4], [2], [0]]
    layers = [
        {"name": name, "num_experts": 12, "groups": kept, "dropped": [1, 3, 5, 7, 9, 11]}
        for name in LAYERS
    ]
    return {"schema": 1, "layers": layers, **changes}


def router(folder: Path, layer: str = LAYERS[0]) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[f"{layer}.gate.weight"]


def test_a_plan_from_scratch_is_carried_out_without_calibration(work: Workplace) -> None:
    work.out.mkdir()
    (work.out / "plan.json").write_text(json.dumps(by_hand()))
    before = hash_of(work.out / "plan.json")
    told = work.done("compress").err
    assert "out/plan.json was written by hand and is used as it is" in told
    assert not (work.out / "statistics.safetensors").exists()
    for layer in LAYERS:
        kept = router(work.folder / "model", layer)[[10, 8, 6, 4, 2, 0]]
        torch.testing.assert_close(router(work.out / "compressed", layer), kept, rtol=0, atol=0)
    told = work.done("compress", "--model.overwrite=true").err
    assert "compress: wrote" in told
    assert hash_of(work.out / "plan.json") == before


def test_a_plan_from_scratch_may_merge_and_leave_layers_out(work: Workplace) -> None:
    work.out.mkdir()
    pairs = [[e, e + 1] for e in range(0, 12, 2)]
    layer = {"name": LAYERS[1], "num_experts": 12, "groups": pairs}
    mean = "lightning_smoe.functional.router.MeanRows"
    plan = by_hand(layers=[layer], router={"class_path": mean})
    (work.out / "plan.json").write_text(json.dumps(plan))
    work.done("evaluate")
    counts = read(work.out / "report.json")["models"]["compressed"]["experts_per_layer"]
    assert counts == [12, 6]
    original = router(work.folder / "model", LAYERS[1])
    expected = (original[::2].double() + original[1::2].double()) / 2
    torch.testing.assert_close(router(work.out / "compressed", LAYERS[1]), expected.float())


def decisions(work: Workplace) -> dict[str, Any]:
    """The plan but for what came of its refit, which compress adds."""
    return {name: part for name, part in read(work.out / "plan.json").items() if name != "refits"}


def edit(work: Workplace) -> list[int]:
    """Puts a dropped expert in the place of the first kept one of the first layer."""
    plan = read(work.out / "plan.json")
    layer = plan["layers"][0]
    layer["groups"][0], layer["dropped"][0] = [layer["dropped"][0]], layer["groups"][0][0]
    (work.out / "plan.json").write_text(json.dumps(plan))
    return [group[0] for group in layer["groups"]]


def test_an_edited_plan_is_what_compress_carries_out(work: Workplace) -> None:
    work.done("plan")
    kept = edit(work)
    before = decisions(work)
    work.done("compress")
    expected = router(work.folder / "model")[kept]
    torch.testing.assert_close(router(work.out / "compressed"), expected, rtol=0, atol=0)
    stored = hash_of(work.out / "plan.json")
    told = work.done("compress").err
    assert "compress: out/compressed is there already" in told
    assert decisions(work) == before
    assert hash_of(work.out / "plan.json") == stored


def test_a_plan_edited_after_compression_is_not_lost_to_overwrite(finished: Workplace) -> None:
    kept = edit(finished)
    before = decisions(finished)
    match = r"compressed holds the result of another run \(different: plan\)"
    finished.refused(match, "compress")
    finished.done("compress", "--model.overwrite=true")
    assert decisions(finished) == before
    expected = router(finished.folder / "model")[kept]
    torch.testing.assert_close(router(finished.out / "compressed"), expected, rtol=0, atol=0)


def test_compress_notes_in_the_plan_what_came_of_each_refit(work: Workplace) -> None:
    work.done("plan")
    assert "refits" not in read(work.out / "plan.json")
    work.done("compress")
    refits = read(work.out / "plan.json")["refits"]
    assert list(refits) == list(LAYERS)
    for refit in refits.values():
        assert refit["applied"] == (refit["after"] < refit["before"])
    work.done("compress", "--model.recipe.refit=null", "--model.overwrite=true")
    assert not read(work.out / "plan.json").get("refits")


def test_the_plan_is_readable_and_names_every_expert_once(finished_once: Workplace) -> None:
    plan = read(finished_once.out / "plan.json")
    assert plan["schema"] == 1
    assert [layer["name"] for layer in plan["layers"]] == list(LAYERS)
    for layer in plan["layers"]:
        named = [*layer["dropped"], *(e for group in layer["groups"] for e in group)]
        assert sorted(named) == list(range(12))
        assert len(layer["groups"]) == 6
    assert plan["router"]["class_path"].startswith("lightning_smoe.")
    # A line a group at least, so that an editor and a diff are of use.
    assert len((finished_once.out / "plan.json").read_text().splitlines()) > 40


def test_a_plan_of_another_model_is_refused(finished: Workplace) -> None:
    weights = finished.folder / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for verb in ("plan", "compress", "fit", "evaluate"):
        finished.refused(r"made for another model; plan again with model\.overwrite true", verb)
    told = finished.done("compress", "--model.overwrite=true").err
    assert "plan: wrote" in told


def test_plans_that_cannot_be_carried_out_are_refused(work: Workplace) -> None:
    work.out.mkdir()
    layers = by_hand()["layers"]

    def first(**changes: Any) -> str:
        return json.dumps(by_hand(layers=[{**layers[0], **changes}, layers[1]]))

    for content, match in (
        ("{", r"plan\.json is not a plan \(JSONDecodeError"),
        ("[]", r"plan\.json is not a plan"),
        ("{}", r"plan\.json is not a plan \(KeyError: 'layers'"),
        (first(groups=[[0], [2], [4]], dropped=[1, 3, *range(5, 12)]), r"selects top_k=4; keep"),
        (first(dropped=[1, 3, 5, 7, 9]), r"names expert 11 0 times; name each of 0 to 11 once"),
        (first(dropped=[1, 1, 3, 5, 7, 9, 11]), r"names expert 1 2 times"),
        (first(num_experts=60), r"the plan is for 60 experts and the model has 12"),
        (first(name="model.layers.1.mlp"), r"names 'model\.layers\.1\.mlp' .* layers are model"),
        (json.dumps(by_hand(router={"class_path": "os.system"})), r"os\.system"),
    ):
        (work.out / "plan.json").write_text(content)
        (work.out / ".lock").touch()
        work.refused(match, "compress")
    # A slip of the pen must not cost the plan.
    work.refused(match, "compress", "--model.overwrite=true")
