"""Layers with different numbers of experts: told in config.json, loaded by stock transformers."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models.checkpoint import load, outline, resize_layers
from lightning_smoe.models.description import counted_config
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.mapped import become_mapped, check_mappable, stock_fields
from lightning_smoe.models.saving import save
from tests.families import NUM_EXPERTS, build
from tests.models.pruning import (
    CARD,
    MANIFEST,
    load_stock,
    prune,
    save_pruned,
    stored_tensors,
)
from tests.models.sharing import share


def counts_of(model: PreTrainedModel) -> dict[int, int]:
    return {layer.index: layer.num_experts for layer in find_moe_layers(model)}


def outlined(folder: Path) -> PreTrainedModel:
    return outline(open_checkpoint(folder))


@torch.no_grad()
def test_uneven_counts_are_told_and_loaded_and_all_other_layers_keep_every_bit(
    family: str, saved_checkpoint: Callable[[str], Path], tmp_path: Path, tokens: Tensor
) -> None:
    source, target = saved_checkpoint(family), tmp_path / "out"
    changed, other = counts_of(outlined(source))
    model = save_pruned(source, target, {changed: 8})
    # A folder that knows nothing of this project's own file beside the weights.
    (target / "smoe.json").unlink()
    expected = {changed: 8, other: NUM_EXPERTS}
    assert counts_of(outlined(target)) == expected
    reloaded = load(target)
    assert counts_of(reloaded) == expected
    torch.testing.assert_close(reloaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    # As anybody would, after `import lightning_smoe`: the code in the folder does not run.
    assert type(load_stock(target)) is type(model)
    before, after = stored_tensors(source), stored_tensors(target)
    assert after.keys() < before.keys() or after.keys() == before.keys()
    untouched = [key for key in before if f".layers.{changed}." not in key]
    assert any(f".layers.{other}." in key for key in untouched)
    for key in untouched:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)


def test_the_configuration_is_the_originals_but_for_the_counts(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = saved_checkpoint("qwen3_moe")
    old = json.loads((source / "config.json").read_text())
    old |= {"auto_map": {"AutoTokenizer": "some.Tokenizer", "AutoModel": "some.Model"}}
    (source / "config.json").write_text(json.dumps(old))
    save_pruned(source, tmp_path / "out", {0: 8, 2: 10})
    new = json.loads((tmp_path / "out/config.json").read_text())
    assert new == old | {
        "architectures": ["MappedQwen3MoeForCausalLM"],
        "model_type": "mapped_qwen3_moe",
        "auto_map": {
            "AutoTokenizer": "some.Tokenizer",
            "AutoConfig": "modeling_smoe.MappedQwen3MoeConfig",
            "AutoModelForCausalLM": "modeling_smoe.MappedQwen3MoeForCausalLM",
            "AutoModel": "modeling_smoe.MappedQwen3MoeModel",
        },
        "num_local_experts": 10,
        "num_router_rows_per_layer": {"0": 8, "2": 10},
        "original_fields": {key: old[key] for key in ("model_type", "architectures", "auto_map")},
    }
    assert (tmp_path / "out/modeling_smoe.py").exists()
    assert stock_fields(new) == old | {"num_local_experts": 10}
    assert stock_fields(old) == old


@torch.no_grad()
def test_an_outline_of_uneven_counts_takes_no_memory(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = save_pruned(saved_checkpoint("gpt_oss"), tmp_path / "out", {1: 6})
    built = outlined(tmp_path / "out")
    assert all(parameter.is_meta for parameter in built.parameters())
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in built.state_dict().items()} == shapes


@torch.no_grad()
def test_an_uneven_checkpoint_is_compressed_further_and_becomes_even_again(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path, tokens: Tensor
) -> None:
    source = saved_checkpoint("ernie4_5_moe")
    save_pruned(source, tmp_path / "first", {1: 10})
    model = save_pruned(tmp_path / "first", tmp_path / "second", {1: 6, 2: 8})
    assert counts_of(outlined(tmp_path / "second")) == {1: 6, 2: 8}
    assert torch.equal(load(tmp_path / "second")(tokens).logits, model(tokens).logits)
    model = save_pruned(tmp_path / "first", tmp_path / "even", 8)
    config = open_checkpoint(tmp_path / "even").config
    assert config == open_checkpoint(source).config | {"moe_num_experts": 8}
    assert not (tmp_path / "even/modeling_smoe.py").exists()
    stock = load_stock(tmp_path / "even")
    torch.testing.assert_close(stock(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@torch.no_grad()
def test_rows_that_differ_by_layer_come_to_share_experts(
    family: str, saved_checkpoint: Callable[[str], Path], tmp_path: Path, tokens: Tensor
) -> None:
    source = saved_checkpoint(family)
    first, _ = counts_of(outlined(source))
    save_pruned(source, tmp_path / "first", {first: 8})
    model = load(tmp_path / "first")
    check_mappable(model)
    layers = find_moe_layers(model)
    assignments = [torch.arange(8) % 6, torch.arange(NUM_EXPERTS) % 7]
    for layer, sent, count in zip(layers, assignments, (6, 7), strict=True):
        layer.share(layer.weights().select(torch.arange(count)), sent)
    logits = model(tokens).logits
    folder = open_checkpoint(tmp_path / "first")
    save(model, folder, tmp_path / "second", manifest=MANIFEST, card=CARD)
    reloaded = load(tmp_path / "second")
    torch.testing.assert_close(reloaded(tokens).logits, logits, rtol=0, atol=0)
    assert list(counts_of(reloaded).values()) == [6, 7]
    assert [layer.num_router_rows for layer in find_moe_layers(reloaded)] == [8, NUM_EXPERTS]
    assert isinstance(load_stock(tmp_path / "second"), type(reloaded))


def test_a_folder_of_version_0_1_0_still_loads(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path, tokens: Tensor
) -> None:
    source, target = saved_checkpoint("mixtral"), tmp_path / "out"
    model = save_pruned(source, target, {0: 8})
    # There config.json was the original's, and smoe.json alone knew better.
    (target / "config.json").write_text((source / "config.json").read_text())
    told = json.loads((target / "smoe.json").read_text()) | {"experts_per_layer": {"0": 8}}
    (target / "smoe.json").write_text(json.dumps(told))
    (target / "modeling_smoe.py").unlink()
    assert counts_of(outlined(target)) == {0: 8, 1: NUM_EXPERTS}
    assert torch.equal(load(target)(tokens).logits, model(tokens).logits)
    save_pruned(target, tmp_path / "again", {1: 9})
    assert open_checkpoint(tmp_path / "again").config["num_router_rows_per_layer"] == {
        "0": 8,
        "1": 9,
    }
    assert counts_of(load_stock(tmp_path / "again")) == {0: 8, 1: 9}


@torch.no_grad()
def test_the_model_without_its_head_loads_too(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path, tokens: Tensor
) -> None:
    model = save_pruned(saved_checkpoint("mixtral"), tmp_path / "out", {0: 8})
    # Any: transformers declares no type for the pair that it returns here.
    loaded: Any = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    body, report = loaded
    assert type(body).__name__ == "MappedMixtralModel"
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    states, wanted = body(tokens)[0], model.base_model(tokens)[0]
    torch.testing.assert_close(states, wanted, rtol=0, atol=1e-5)
    body.save_pretrained(tmp_path / "body")
    again = AutoModel.from_pretrained(tmp_path / "body")
    torch.testing.assert_close(again(tokens)[0], states, rtol=0, atol=1e-5)


def test_the_load_balancing_loss_is_refused_where_it_has_no_meaning(tokens: Tensor) -> None:
    even, uneven = build("mixtral"), build("mixtral")
    become_mapped(share(even))
    assert even(tokens, labels=tokens, output_router_logits=True).aux_loss > 0
    prune(uneven, {0: 8})
    become_mapped(uneven)
    with pytest.raises(ValueError, match=r"equal numbers of router rows, and these are .*'0': 8"):
        uneven(tokens, labels=tokens, output_router_logits=True)
    uneven.config.output_router_logits = True
    with pytest.raises(ValueError, match="set output_router_logits=False"):
        uneven(tokens)
    found = uneven.base_model(tokens, output_router_logits=True).router_logits
    assert [logits.shape[-1] for logits in found] == [8, NUM_EXPERTS]
    loss = uneven(tokens, labels=tokens, output_router_logits=False).loss
    loss.backward()
    for layer in find_moe_layers(uneven):
        for parameter in [*layer.parameters_of("experts"), *layer.parameters_of("router")]:
            assert parameter.grad is not None


def test_a_family_whose_configuration_cannot_say_it_is_refused_before_any_work(
    saved_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_checkpoint(saved_checkpoint("mixtral"))
    kind = type(AutoConfig.from_pretrained(folder.path))
    inner = copy.copy(build("mixtral").config)
    assert counted_config(folder, {0: 8, 1: 8})["num_local_experts"] == 8
    monkeypatch.setattr(kind, "get_text_config", lambda *_, **__: inner)
    with pytest.raises(InputError, match="nor its layers differ in their number"):
        counted_config(folder, {0: 8, 1: 12})


def test_only_the_named_layers_are_resized(
    saved_checkpoint: Callable[[str], Path],
) -> None:
    model = outlined(saved_checkpoint("deepseek_v3"))
    resize_layers(model, {2: 4, 0: 3})
    assert counts_of(model) == {1: NUM_EXPERTS, 2: 4}
