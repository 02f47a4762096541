"""The script that writes random checkpoints of true shape: what it writes, and what it refuses."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from lightning_smoe.models.checkpoint import outline
from lightning_smoe.models.folder import CheckpointFolder
from tests.cli.command import check_refusal, run_in, snapshot
from tests.models.pruning import full_disk, load_stock, stored_tensors

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_checkpoint.py"
# As their makers and the hub's pages have them.
PUBLISHED = {
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "olmoe-1b-7b": 6_919_161_856,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v2-lite": 15_706_484_224,
}

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make(script: ModuleType, tmp_path: Path) -> Make:
    def run(model: Path, name: str, *words: str) -> Path:
        outcome = run_in(tmp_path, script.main, model, name, *words)
        assert outcome.code == 0, outcome.err
        return tmp_path / name

    return run


@pytest.mark.parametrize(("name", "size"), PUBLISHED.items())
def test_a_named_model_has_as_many_numbers_as_published(
    name: str, size: int, script: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(script.configuration(name, None)))
    assert outline(CheckpointFolder(tmp_path)).num_parameters() == size


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_stock_transformers_loads_what_is_written(
    family: str, make: Make, built_checkpoint: Callable[[str], Path]
) -> None:
    folder = make(built_checkpoint(family), "out", "--max_shard_size", "100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = load_stock(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert stored_tensors(folder).keys() == stored_tensors(built_checkpoint(family)).keys()
    text = AutoTokenizer.from_pretrained(folder)("Half of 8 is", return_tensors="pt")
    assert model(**text).logits.isfinite().all()


def test_numbers_are_of_the_size_of_trained_ones_and_routing_is_decisive(
    make: Make, built_checkpoint: Callable[[str], Path]
) -> None:
    found = stored_tensors(make(built_checkpoint("qwen2_moe"), "out", "--dtype", "float32"))
    assert found["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    # 4 over the root of the width, which is 32, for normalised states.
    router = found["model.layers.0.mlp.gate.weight"]
    assert router.std().item() == pytest.approx(4 / 32**0.5, rel=0.2)
    assert found["model.layers.0.mlp.shared_expert_gate.weight"].std().item() < 0.05
    assert found["model.norm.weight"].eq(1).all()
    bias = found["model.layers.0.self_attn.q_proj.bias"]
    assert 0 < bias.std().item() < 0.05


def test_each_tensor_follows_from_seed_and_key_alone(
    make: Make, built_checkpoint: Callable[[str], Path]
) -> None:
    model = built_checkpoint("qwen2_moe")

    def made(*words: str) -> dict[str, Tensor]:
        return stored_tensors(make(model, "".join(words).strip("-"), *words))

    whole = made("--seed=3", "--max_shard_size=50KB")
    first = made("--seed=3", "--layers=1")
    other = made("--seed=4", "--layers=1")
    assert 0 < len(first) < len(whole)
    assert all(torch.equal(tensor, whole[key]) for key, tensor in first.items())
    drawn = [key for key, tensor in first.items() if tensor.ndim > 1]
    assert not any(torch.equal(first[key], other[key]) for key in drawn)
    experts = [whole[f"model.layers.{i}.mlp.experts.{e}.up_proj.weight"] for i, e in ((0, 1),)]
    assert not torch.equal(experts[0], whole["model.layers.0.mlp.experts.0.up_proj.weight"])


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("no-such-model", "new"), r"no model is named no-such-model; take one of qwen1\.5-moe-"),
        (("mixtral-8x7b", "taken"), r"taken is there already and holds something"),
        (("mixtral-8x7b", "taken/mine.txt"), r"mine\.txt is there already and holds something"),
        (("mixtral-8x7b", "new", "--layers=33"), r"--layers=33 is more than the 32 of mixtral"),
        (("mixtral-8x7b", "new", "--layers=0"), r"layers"),
        (("mixtral-8x7b", "new", "--max_shard_size=4XB"), r"4XB is no size; write 500MB or 4GB"),
        (("mixtral-8x7b", "new", "--dtype=int8"), r"dtype"),
        (("mixtral-8x7b", "new", "--layers=2"), r"no space is left .*new needs 6\.\d\d GB and the"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(
    words: tuple[str, ...],
    match: str,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    before = snapshot(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", full_disk)
    check_refusal(run_in(tmp_path, script.main, *words), match)
    assert snapshot(tmp_path) == before
