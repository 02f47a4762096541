"""Layers with different numbers of experts load with this project, and claim nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_smoe.models.checkpoint import load, outline, resize_layers
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from tests.families import NUM_EXPERTS
from tests.models.pruning import load_stock, save_pruned, stored_tensors


def counts_of(folder: Path) -> dict[int, int]:
    layers = find_moe_layers(outline(open_checkpoint(folder)))
    return {layer.index: layer.num_experts for layer in layers}


@torch.no_grad()
def test_uneven_counts_load_and_are_told_and_all_other_layers_keep_every_bit(
    family: str, saved_checkpoint: Callable[[str], Path], tmp_path: Path, tokens: Tensor
) -> None:
    source, target = saved_checkpoint(family), tmp_path / "out"
    changed, other = counts_of(source)
    model = save_pruned(source, target, {changed: 8})
    expected = {changed: 8, other: NUM_EXPERTS}
    folder = open_checkpoint(target)
    assert folder.experts_per_layer == expected
    assert counts_of(target) == expected
    assert folder.config == open_checkpoint(source).config
    reloaded = load(target)
    assert {layer.index: layer.num_experts for layer in find_moe_layers(reloaded)} == expected
    torch.testing.assert_close(reloaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    before, after = stored_tensors(source), stored_tensors(target)
    untouched = [key for key in before if f".layers.{changed}." not in key]
    assert any(f".layers.{other}." in key for key in untouched)
    for key in untouched:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)


def test_stock_transformers_does_not_load_uneven_counts(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    save_pruned(saved_checkpoint("mixtral"), tmp_path / "out", {0: 8})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_outline_of_uneven_counts_takes_no_memory(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = save_pruned(saved_checkpoint("gpt_oss"), tmp_path / "out", {1: 6})
    outlined = outline(open_checkpoint(tmp_path / "out"))
    assert all(parameter.is_meta for parameter in outlined.parameters())
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in outlined.state_dict().items()} == shapes


def test_an_uneven_checkpoint_is_compressed_further(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path, tokens: Tensor
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save_pruned(saved_checkpoint("ernie4_5_moe"), first, {1: 10})
    model = save_pruned(first, second, {1: 6, 2: 8})
    assert open_checkpoint(second).experts_per_layer == {1: 6, 2: 8}
    assert torch.equal(load(second)(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_an_uneven_checkpoint_that_becomes_even_loads_in_stock_transformers(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path, tokens: Tensor
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save_pruned(saved_checkpoint("mixtral"), first, {0: 10})
    model = save_pruned(first, second, 8)
    assert json.loads((second / "smoe.json").read_text())["experts_per_layer"] == {}
    stock = load_stock(second)
    torch.testing.assert_close(stock(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


def test_only_the_named_layers_are_resized(
    saved_checkpoint: Callable[[str], Path],
) -> None:
    model = outline(open_checkpoint(saved_checkpoint("deepseek_v3")))
    resize_layers(model, {2: 4, 0: 3})
    counts = {layer.index: layer.num_experts for layer in find_moe_layers(model)}
    assert counts == {1: NUM_EXPERTS, 2: 4}
