"""Models that come from their files a decoder layer at a time: the same bits as in memory."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.streamed import Streamed
from lightning_smoe.models.walk import embed, finish, run_layer
from tests.families import FAMILIES, build

CPU = torch.device("cpu")


def walked(residence: Streamed, tokens: Tensor) -> Tensor:
    """Logits, with one decoder layer in memory at a time."""
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with residence.outside(CPU, "inputs"):
        waiting = embed(residence.model, batch, batch["attention_mask"].bool())
    for index in range(residence.num_layers):
        with residence.layer(index, CPU) as layer:
            waiting = waiting.moved(run_layer(layer, waiting, index))
    with residence.outside(CPU, "inputs"):
        states = finish(residence.model, batch, waiting.states)
    head = residence.model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    with residence.outside(CPU, "head"), torch.no_grad():
        logits: Tensor = head(states)
    return logits


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in FAMILIES), ("deepseek_v3", torch.bfloat16)],
)
def test_a_streamed_model_has_every_bit_of_the_loaded_one(
    built_checkpoint: Callable[[str], Path], family: str, dtype: torch.dtype, tokens: Tensor
) -> None:
    path = built_checkpoint(family)
    whole = load(path, dtype)
    residence = Streamed(open_checkpoint(path), dtype)
    found: dict[str, Tensor] = {}
    with residence.outside(CPU) as model:
        found |= {k: t.clone() for k, t in model.state_dict().items() if not t.is_meta}
    for index in range(residence.num_layers):
        with residence.layer(index, CPU):
            state = residence.model.state_dict()
            found |= {k: t.clone() for k, t in state.items() if f".{index}." in k}
    wanted = whole.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert all(p.is_meta for p in residence.model.parameters())
    assert torch.equal(walked(residence, tokens), whole(tokens).logits)


@torch.no_grad()
def test_tied_embeddings_are_read_for_both_ends(tmp_path: Path, tokens: Tensor) -> None:
    model = build("qwen3_moe")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    residence = Streamed(open_checkpoint(tmp_path))
    assert torch.equal(walked(residence, tokens), load(tmp_path)(tokens).logits)


@torch.no_grad()
def test_shards_in_the_type_of_the_files_are_read_alike(tmp_path: Path, tokens: Tensor) -> None:
    model = build("deepseek_v3").bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    folder = open_checkpoint(tmp_path)
    assert len(folder.shards) > 1
    assert torch.equal(walked(Streamed(folder), tokens), load(tmp_path)(tokens).logits)


def test_a_tensor_that_is_not_there_is_missed_before_any_is_read(
    saved_checkpoint: Callable[[str], Path],
) -> None:
    path = saved_checkpoint("qwen2_moe")
    state = load_file(path / "model.safetensors")
    del state["model.layers.2.mlp.gate.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 tensors .* model.layers.2.mlp.gate.weight"):
        Streamed(open_checkpoint(path))


def test_a_tensor_of_another_shape_is_named(saved_checkpoint: Callable[[str], Path]) -> None:
    path = saved_checkpoint("qwen2_moe")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 20}))
    residence = Streamed(open_checkpoint(path))
    with (
        pytest.raises(InputError, match=r"has not the shape that config\.json says"),
        residence.layer(0, CPU),
    ):
        pass


def test_tensors_without_a_place_are_said(
    saved_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = saved_checkpoint("qwen2_moe")
    state = load_file(path / "model.safetensors")
    state["model.layers.9.mlp.gate.weight"] = torch.zeros(2)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        Streamed(open_checkpoint(path))
    assert "1 tensors are not used, such as model.layers.9.mlp.gate.weight" in caplog.text


def leaves(model: PreTrainedModel) -> int:
    """Numbers that are in memory as parameters."""
    return sum(p.numel() for p in model.parameters() if not p.is_meta)


def test_an_error_while_a_layer_is_held_frees_it(built_checkpoint: Callable[[str], Path]) -> None:
    residence = Streamed(open_checkpoint(built_checkpoint("mixtral")))

    def fail() -> None:
        with residence.layer(0, CPU):
            assert leaves(residence.model)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not leaves(residence.model)
