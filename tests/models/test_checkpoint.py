"""A compressed checkpoint loads in stock transformers and is its original but for the experts."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.models.checkpoint import load, outline
from lightning_smoe.models.expert_count import COUNT_FIELDS
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.saving import save
from lightning_smoe.models.stored import stored_bytes
from tests.conftest import SHIPPED_CHECKPOINT, TOKENIZER_FILES
from tests.families import FAMILIES, NUM_EXPERTS
from tests.models.pruning import (
    CARD,
    MANIFEST,
    contents,
    load_stock,
    save_pruned,
    store_tensors,
    stored_tensors,
)

KEPT = 8
# Stock transformers leaves weights where they lie in the file, which decides the last bits.
ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class Saved:
    """A model with 8 of 12 experts in every layer, and where it was saved."""

    source: Path
    target: Path
    model: PreTrainedModel


@pytest.fixture(scope="module", params=FAMILIES)
def pruned(
    request: pytest.FixtureRequest,
    built_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Saved:
    """Every family in turn, compressed once for all tests that look at the folder."""
    source = built_checkpoint(request.param)
    target = tmp_path_factory.mktemp("compressed") / request.param
    return Saved(source, target, save_pruned(source, target, KEPT))


@torch.no_grad()
def test_stock_transformers_loads_a_pruned_checkpoint(pruned: Saved, tokens: Tensor) -> None:
    stock = load_stock(pruned.target)
    expected = pruned.model.state_dict()
    assert stock.state_dict().keys() == expected.keys()
    for key, tensor in stock.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0)
    logits = pruned.model(tokens).logits
    torch.testing.assert_close(stock(tokens).logits, logits, rtol=0, atol=ROUNDING)


@torch.no_grad()
def test_a_reloaded_checkpoint_gives_every_logit_bit_for_bit(pruned: Saved, tokens: Tensor) -> None:
    logits = pruned.model(tokens).logits
    torch.testing.assert_close(load(pruned.target)(tokens).logits, logits, rtol=0, atol=0)


def test_the_configuration_is_the_originals_but_for_the_number_of_experts(pruned: Saved) -> None:
    old, new = (json.loads((p / "config.json").read_text()) for p in (pruned.source, pruned.target))
    stated = [field for field in COUNT_FIELDS if old.get(field) == NUM_EXPERTS]
    assert stated
    assert new == {**old, **dict.fromkeys(stated, KEPT)}
    assert list(new) == list(old)


def test_tokenizer_and_generation_settings_are_copied_byte_for_byte(pruned: Saved) -> None:
    before, after = contents(pruned.source), contents(pruned.target)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        assert after[name] == before[name]
    written = {"config.json", "model.safetensors", "README.md", "smoe.json"}
    assert after.keys() == before.keys() | written


def test_card_and_manifest_lie_beside_the_weights(pruned: Saved) -> None:
    assert (pruned.target / "README.md").read_text() == CARD
    stored = json.loads((pruned.target / "smoe.json").read_text())
    files = stored.pop("files")
    assert stored == {"schema": 1, "experts_per_layer": {}, "manifest": MANIFEST.to_json()}
    hashes = {name: sha256(data).hexdigest() for name, data in contents(pruned.target).items()}
    # Whoever edits the card damages nothing.
    assert files == {n: h for n, h in hashes.items() if n not in ("README.md", "smoe.json")}


def test_an_outline_counts_right_and_takes_no_memory(pruned: Saved) -> None:
    model = outline(open_checkpoint(pruned.target))
    assert {layer.num_experts for layer in find_moe_layers(model)} == {KEPT}
    assert all(parameter.is_meta for parameter in model.parameters())
    shapes = {key: tensor.shape for key, tensor in pruned.model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes


def test_no_scratch_folder_is_left(pruned: Saved) -> None:
    assert [path.name for path in pruned.target.parent.iterdir()] == [pruned.target.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_keeps_the_type_it_has_in_the_original(
    family: str, dtype: torch.dtype, saved_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = saved_checkpoint(family)
    # As DeepSeek, MiniMax and ERNIE publish: routers in float32, all else in bfloat16.
    router = ("gate.weight", "router.weight", "router.layer.weight", "router.bias")
    tensors = {
        key: tensor if key.endswith((*router, "correction_bias")) else tensor.bfloat16()
        for key, tensor in stored_tensors(source).items()
    }
    store_tensors(source, tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.bfloat16}
    save_pruned(source, tmp_path / "out", {}, dtype)
    saved = stored_tensors(tmp_path / "out")
    assert {k: t.dtype for k, t in saved.items()} == {k: t.dtype for k, t in tensors.items()}
    if dtype == torch.float32:
        for key, tensor in saved.items():
            torch.testing.assert_close(tensor, tensors[key], rtol=0, atol=0)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    source = open_checkpoint(SHIPPED_CHECKPOINT)
    model = save_pruned(SHIPPED_CHECKPOINT, tmp_path / "copy", {})
    copy = open_checkpoint(tmp_path / "copy")
    assert copy.tensors.keys() == source.tensors.keys()
    assert "lm_head.weight" not in copy.tensors
    header = 100 * len(source.tensors)  # bytes; names, shapes and places
    assert abs(copy.num_bytes - source.num_bytes) < header
    assert abs(stored_bytes(model, source) - source.num_bytes) < 2 * header
    assert copy.config == source.config
    copied = stored_tensors(tmp_path / "copy")
    for key, tensor in stored_tensors(SHIPPED_CHECKPOINT).items():
        torch.testing.assert_close(copied[key], tensor, rtol=0, atol=0)


def test_a_sharded_checkpoint_is_compressed(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path, tokens: Tensor
) -> None:
    source = saved_checkpoint("mixtral")
    whole = load(source)
    (source / "model.safetensors").unlink()
    whole.save_pretrained(source, max_shard_size="200KB")
    assert len(open_checkpoint(source).shards) > 2
    assert torch.equal(load(source)(tokens).logits, whole(tokens).logits)
    model = save_pruned(source, tmp_path / "out", KEPT)
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
    assert torch.equal(load(tmp_path / "out")(tokens).logits, model(tokens).logits)


def test_a_large_model_is_saved_in_shards_that_stock_transformers_loads(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_checkpoint(saved_checkpoint("qwen3_moe"))
    model = load(source.path)
    target = tmp_path / "out"
    save(model, source, target, manifest=MANIFEST, card=CARD, max_shard_size=200_000)
    assert len(open_checkpoint(target).shards) > 2
    for key, tensor in load_stock(target).state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[key], rtol=0, atol=0)


def test_saving_replaces_an_older_folder(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = saved_checkpoint("olmoe")
    save_pruned(source, tmp_path / "out", 10)
    (tmp_path / "out/stale.txt").touch()
    save_pruned(source, tmp_path / "out", KEPT)
    assert open_checkpoint(tmp_path / "out").config["num_experts"] == KEPT
    assert not (tmp_path / "out/stale.txt").exists()


@torch.no_grad()
def test_the_model_in_memory_is_rounded_to_the_type_of_its_original(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path, tokens: Tensor
) -> None:
    source = saved_checkpoint("qwen2_moe")
    store_tensors(source, {key: t.bfloat16() for key, t in stored_tensors(source).items()})
    model = load(source)
    for parameter in model.parameters():
        parameter.mul_(1 + 1e-4)  # falls between two numbers of bfloat16
    before = model(tokens).logits
    save(model, open_checkpoint(source), tmp_path / "out", manifest=MANIFEST, card=CARD)
    after = model(tokens).logits
    assert not torch.equal(after, before)
    torch.testing.assert_close(load(tmp_path / "out")(tokens).logits, after, rtol=0, atol=0)


@torch.no_grad()
def test_where_weights_lie_in_their_file_does_not_change_a_bit_of_the_logits(
    saved_checkpoint: Callable[[str], Path], tokens: Tensor
) -> None:
    source = saved_checkpoint("qwen2_moe")
    tensors, logits = stored_tensors(source), load(source)(tokens).logits
    for padding in range(0, 64, 8):  # bytes; the header's length is a multiple of eight
        metadata = {"format": "pt", "padding": "x" * padding}
        save_file(tensors, source / "model.safetensors", metadata)
        model = load(source)
        assert not any(parameter.data_ptr() % 64 for parameter in model.parameters())
        torch.testing.assert_close(model(tokens).logits, logits, rtol=0, atol=0)


def test_a_model_in_training_mode_is_saved_as_it_will_be_used(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = saved_checkpoint("mixtral")
    config = json.loads((source / "config.json").read_text())
    # Noise on the router's input, drawn anew for every forward pass while it trains.
    (source / "config.json").write_text(json.dumps({**config, "router_jitter_noise": 0.5}))
    model = load(source).train()
    save(model, open_checkpoint(source), tmp_path / "out", manifest=MANIFEST, card=CARD)
    assert not model.training
