"""Weights have on disk the keys, types, shapes and bits that transformers would store."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lightning_smoe.models.checkpoint import load, outline
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.shards import StoredTensor
from lightning_smoe.models.stored import (
    round_in_place,
    state_parts,
    stored_layout,
    stored_state,
)
from tests.conftest import SHIPPED_CHECKPOINT
from tests.families import FAMILIES
from tests.models.pruning import prune, save_pruned, store_tensors, stored_tensors
from tests.models.sharing import save_shared, share


def check_as_transformers_stores(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Writes a model by transformers itself and compares."""
    original = open_checkpoint(source)
    model.save_pretrained(folder)
    expected = stored_tensors(folder)
    layout = stored_layout(model, original)
    assert layout.tensors == {key: StoredTensor.of(t) for key, t in expected.items()}
    parts = [stored_state(model, original, part) for part in state_parts(model)]
    assert sum(map(len, parts)) == len(expected)
    for key, tensor in (item for part in parts for item in part.items()):
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_stored_as_transformers_stores_it(
    family: str, built_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = built_checkpoint(family)
    model = load(source)
    prune(model, 8)
    check_as_transformers_stores(model, source, tmp_path)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss"])
def test_models_whose_rows_share_experts_are_stored_as_transformers_stores_them(
    family: str, saved_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = saved_checkpoint(family)
    model = save_shared(source, tmp_path / "ours")
    check_as_transformers_stores(model, source, tmp_path / "theirs")
    ours, theirs = (stored_tensors(tmp_path / name) for name in ("ours", "theirs"))
    assert {key for key in ours if key.endswith("expert_map")}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_tied_weights_are_stored_as_transformers_stores_them(tmp_path: Path) -> None:
    model = load(SHIPPED_CHECKPOINT)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.bfloat16()
    check_as_transformers_stores(model, SHIPPED_CHECKPOINT, tmp_path)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_the_layout_is_known_before_any_weight_is(
    family: str, built_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = built_checkpoint(family)
    model = save_pruned(source, tmp_path / "out", 8)
    written = open_checkpoint(tmp_path / "out")
    outlined = outline(written)
    assert all(parameter.is_meta for parameter in outlined.parameters())
    for one in (model, outlined):
        layout = stored_layout(one, open_checkpoint(source))
        with written.shards[0].open("rb") as file:
            header = layout.shards[0].header
            assert file.read(len(header)) == header
        assert written.num_bytes == layout.num_bytes


def test_tied_weights_have_one_place_before_any_weight_is() -> None:
    source = open_checkpoint(SHIPPED_CHECKPOINT)
    model = outline(source)
    assert stored_layout(model, source).tensors.keys() == source.tensors.keys()
    # As whoever frees weights module by module leaves it.
    outlined = torch.empty_like(model.get_output_embeddings().weight)
    model.get_output_embeddings().weight = torch.nn.Parameter(outlined)
    assert stored_layout(model, source).tensors.keys() == source.tensors.keys()


def test_rounding_is_to_the_type_of_each_tensor_on_disk(
    saved_checkpoint: Callable[[str], Path],
) -> None:
    source = saved_checkpoint("olmoe")
    tensors = stored_tensors(source)
    store_tensors(
        source, {k: t if k.endswith("gate.weight") else t.bfloat16() for k, t in tensors.items()}
    )
    model = share(load(source))
    before = {k: t * 1.001 if t.is_floating_point() else t for k, t in model.state_dict().items()}
    model.load_state_dict(before)
    round_in_place(model, open_checkpoint(source))
    for key, tensor in model.state_dict().items():
        expected = before[key]
        if expected.is_floating_point() and not key.endswith("gate.weight"):
            expected = expected.bfloat16().float()
        assert torch.equal(tensor, expected), key
