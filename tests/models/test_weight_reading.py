"""Weights read into their places: every bit of what transformers makes of the same files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_smoe.models.checkpoint import outline
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.weight_reading import FusedWeight, readable_weights
from tests.families import FAMILIES

FUSED = ("qwen3_moe", "mixtral")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_have_every_bit_that_transformers_gives_them(
    built_checkpoint: Callable[[str], Path], family: str
) -> None:
    folder = open_checkpoint(built_checkpoint(family))
    readable = readable_weights(folder, outline(folder), torch.float32)
    if readable is None:  # more than a stack; left to transformers
        assert family not in FUSED
        return
    weights, rules = readable
    wanted = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)
    state = wanted.state_dict()
    assert {name for name in state if name not in wanted.all_tied_weights_keys} <= weights.keys()
    for name in state.keys() & weights.keys():
        found = weights[name][...]
        assert torch.equal(found.to(state[name].dtype), state[name]), name
    assert len(rules) == len(wanted.__dict__["_weight_conversions"])


@pytest.mark.parametrize("family", FUSED)
def test_experts_are_read_as_stacks(built_checkpoint: Callable[[str], Path], family: str) -> None:
    folder = open_checkpoint(built_checkpoint(family))
    readable = readable_weights(folder, outline(folder), torch.bfloat16)
    assert readable is not None
    fused = [w for w in readable[0].values() if isinstance(w, FusedWeight)]
    assert fused
    for weight in fused:
        again = torch.full(weight.shape, torch.nan, dtype=torch.bfloat16)
        weight.read_into(again)
        assert torch.equal(again, weight[...])


@pytest.mark.parametrize("damage", ["missing", "of another shape"])
def test_a_stack_that_does_not_fit_is_left_to_transformers(
    built_checkpoint: Callable[[str], Path], tmp_path: Path, damage: str
) -> None:
    source = open_checkpoint(built_checkpoint("qwen3_moe"))
    tensors = {k: t for shard in source.shards for k, t in load_file(shard).items()}
    key = next(k for k in tensors if k.endswith("experts.3.up_proj.weight"))
    if damage == "missing":
        del tensors[key]
    else:
        tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((source.path / "config.json").read_bytes())
    folder = open_checkpoint(tmp_path)
    assert readable_weights(folder, outline(folder), torch.float32) is None
