"""What is said of tensors that a model has no place for."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.streamed import Streamed
from lightning_smoe.models.unused import sayings
from tests.models.pruning import store_tensors, stored_tensors

AHEAD = "model.layers.3.eh_proj.weight"


@pytest.mark.parametrize("read", [load, lambda path: Streamed(open_checkpoint(path))])
def test_a_line_says_that_layers_which_predict_further_tokens_are_dropped(
    read: Callable[[Path], object],
    saved_checkpoint: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = saved_checkpoint("deepseek_v3")
    store_tensors(path, {**stored_tensors(path), AHEAD: torch.ones(2)})
    with caplog.at_level(logging.WARNING):
        read(path)
    assert (
        f"1 tensors of multi-token-prediction layers ({AHEAD}) are dropped: transformers has no "
        "such layers"
    ) in caplog.text


@pytest.mark.parametrize(
    "key",
    [
        "mtp.0.ffn.gate.weight",
        "model.mtp.layers.0.mlp.up_proj.weight",
        "mtp_block.0.weight",
        "model.layers.61.shared_head.head.weight",
        "model.layers.62.enorm.weight",
    ],
)
def test_they_are_known_by_their_names_or_behind_the_last_layer(key: str) -> None:
    config = {"num_nextn_predict_layers": 2}
    (found,) = sayings(["model.layers.60.mlp.gate.weight", key], [key], config, 61)
    assert found.startswith(f"1 tensors of multi-token-prediction layers ({key})")


def test_other_tensors_are_named_apart() -> None:
    keys = ["model.layers.9.mlp.gate.weight", "model.extra", "mtp.norm.weight"]
    ahead, others = sayings(keys, keys, {}, 3)
    assert "1 tensors of multi-token-prediction layers (mtp.norm.weight)" in ahead
    assert others == "2 tensors are not used, such as model.extra"
    assert sayings(["model.layers.2.mlp.gate.weight"], [], {}, 3) == []
