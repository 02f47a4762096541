"""The export verb: shared experts become stock, and what was kept is listed for other programs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from lightning_smoe.compression.apply import apply_plan
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.errors import InputError
from lightning_smoe.experiment import Experiment
from lightning_smoe.export import Export, Form, fitted_by, retained
from lightning_smoe.models.checkpoint import load
from lightning_smoe.workspace import Workspace
from tests.cli.command import Workplace, snapshot
from tests.models.pruning import load_stock, stored_tensors
from tests.models.sharing import save_shared

LAYERS = ("model.layers.0.mlp", "model.layers.2.mlp")
PAIRS = [[e, 11 - e] for e in range(6)]
MAP = "lightning_smoe.functional.router_rows.Map"
LSE = "lightning_smoe.functional.router.LogSumExp"


def write_plan(folder: Path, layers: Sequence[dict[str, Any]], router: str | None = None) -> None:
    """A plan by hand."""
    folder.mkdir(exist_ok=True)
    plan = {"schema": 1, "layers": layers}
    settings = {} if router is None else {"router": {"class_path": router}}
    (folder / "plan.json").write_text(json.dumps(plan | settings))


def paired(router: str, folder: Path) -> None:
    """A plan of pairs for both layers."""
    layers = [{"name": name, "num_experts": 12, "groups": PAIRS} for name in LAYERS]
    write_plan(folder, layers, router)


def workspace(work: Workplace, **settings: Any) -> Workspace:
    """The experiment as a verb sees it."""
    folder = work.folder
    experiment = Experiment(
        **{"checkpoint": str(folder / "model"), "output_dir": folder / "out", **settings}
    )
    return Workspace(experiment, TextDataModule(path=folder / "text", sequence_length=64))


@torch.no_grad()
def test_exports_are_what_the_same_plan_gives(work: Workplace) -> None:
    paired(MAP, work.folder / "map")
    paired(LSE, work.folder / "lse")
    work.done("compress", "--model.output_dir=map")
    work.done("compress", "--model.output_dir=lse")
    words = ("--model.output_dir=map", "--to=stock", "--output=stock")
    work.done("export", *words)
    stock, wanted = work.folder / "stock", work.folder / "lse/compressed"
    found, expected = stored_tensors(stock), stored_tensors(wanted)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
    assert (stock / "config.json").read_text() == (wanted / "config.json").read_text()
    assert not (stock / "modeling_smoe.py").exists()
    # It loads in transformers, and is nearer to what it was exported from than sliced rows are.
    mapped = load(work.folder / "map/compressed")
    sliced = load(work.folder / "model")
    plan = CompressionPlan.load(work.folder / "map/plan.json")
    apply_plan(sliced, CompressionPlan(plan.layers))
    assert 0 < distance(load_stock(stock), mapped) < distance(sliced, mapped)
    before = snapshot(stock)
    assert "is there already, made from the same inputs" in work.done("export", *words).err
    assert snapshot(stock) == before
    work.done("export", "--model.output_dir=map", "--to=experts", "--output=kept.json")
    for layer in json.loads((work.folder / "kept.json").read_text())["layers"]:
        assert layer["groups"] == [{"experts": pair, "weights": [0.5, 0.5]} for pair in PAIRS]
        assert "kept" not in layer


def distance(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """Kullback-Leibler divergence on random tokens."""
    tokens = torch.randint(5, 4000, (4, 64), generator=torch.Generator().manual_seed(0))
    found, wanted = (m(tokens).logits.log_softmax(-1) for m in (model, other))
    divergence: Tensor = kl_div(found, wanted, log_target=True, reduction="sum")
    return float(divergence)


def test_experts_that_were_kept_are_listed_with_layers_that_stay(work: Workplace) -> None:
    kept, dropped = [10, 8, 6, 4, 2, 0], [1, 3, 5, 7, 9, 11]
    groups = [[expert] for expert in kept]
    layer = {"name": LAYERS[1], "num_experts": 12, "groups": groups, "dropped": dropped}
    write_plan(work.out, [layer])
    space = workspace(work)
    assert retained(space) == {
        "schema": 1,
        "original": "model",
        "fingerprint": space.source.fingerprint,
        "layers": [
            {"index": 0, "name": LAYERS[0], "num_experts": 12, "kept": [*range(12)]},
            {"index": 2, "name": LAYERS[1], "num_experts": 12, "kept": kept},
        ],
    }


def test_what_makes_no_sense_is_refused_before_any_work(
    work: Workplace, built_checkpoint: Callable[[str], Path]
) -> None:
    folder = work.folder
    save_shared(folder / "model", folder / "shared")
    save_shared(built_checkpoint("qwen3_moe"), folder / "other")
    space, before = workspace(work), snapshot(folder)
    cases: tuple[tuple[Form, str | None, str, str], ...] = (
        ("stock", None, "x", r"out/compressed is not there; run compress, or give --checkpoint"),
        ("stock", "model", "x", "model: each router row has an expert of its own"),
        ("stock", "other", "x", "other is a qwen3_moe and model.checkpoint a qwen2_moe"),
        ("stock", "shared", "shared/x", "--output .*shared/x would lie in .*shared or replace"),
        ("stock", "shared", "model", "--output .*model would lie in .*model or replace it"),
        ("experts", None, "text", "text is there already; name another file"),
        ("experts", None, "experiment.yaml", r"experiment\.yaml is there already; name another"),
        ("experts", "shared", "x", "--checkpoint changes nothing under --to experts"),
    )
    for form, checkpoint, output, match in cases:
        given = None if checkpoint is None else folder / checkpoint
        with pytest.raises(InputError, match=match):
            Export(space, form, folder / output, given, router=fitted_by(0.1))
    assert snapshot(folder) == before
    Export(workspace(work, overwrite=True), "experts", folder / "experiment.yaml", None,
           router=fitted_by(0.1))  # fmt: skip
    with pytest.raises(InputError, match=r"--strength=0.0 must be at least 1e-06"):
        fitted_by(0.0)


def test_too_few_experts_for_the_router_have_no_stock_form(work: Workplace) -> None:
    thirds = [[*range(4)], [*range(4, 8)], [*range(8, 12)]]
    layers = [{"name": name, "num_experts": 12, "groups": thirds} for name in LAYERS]
    write_plan(work.folder / "few", layers, MAP)
    work.done("compress", "--model.output_dir=few")
    few = work.folder / "few/compressed"
    with pytest.raises(InputError, match=r"few/compressed has no stock form: .* top_k=4"):
        Export(workspace(work), "stock", work.folder / "x", few, router=fitted_by(0.1))
