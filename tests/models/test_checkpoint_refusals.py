"""What does not load is refused by name, what does not save leaves the disk as it was."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_smoe.errors import InputError
from lightning_smoe.models.checkpoint import load, outline
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.saving import save, verify
from tests.models.pruning import (
    CARD,
    MANIFEST,
    contents,
    full_disk,
    save_pruned,
    store_tensors,
    stored_tensors,
)

LACKS = r"qwen3_moe lacks 1 tensors that its config\.json needs, such as "
CANNOT = "qwen3_moe cannot be loaded: "


@pytest.fixture
def source(saved_checkpoint: Callable[[str], Path]) -> Path:
    return saved_checkpoint("qwen3_moe")


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("model.norm.weight", LACKS + r"model\.norm\.weight; copy the checkpoint again"),
        ("model.layers.2.mlp.gate.weight", LACKS + r"model\.layers\.2\.mlp\.gate\.weight"),
        ("model.layers.0.mlp.experts.5.gate_proj.weight", CANNOT),
        ("model.layers.0.mlp.experts.11.down_proj.weight", CANNOT),
    ],
)
def test_a_missing_tensor_is_refused(source: Path, lost: str, message: str) -> None:
    tensors = stored_tensors(source)
    del tensors[lost]
    store_tensors(source, tensors)
    with pytest.raises(InputError, match=message):
        load(source)


def test_a_language_model_within_a_larger_configuration_is_refused(source: Path) -> None:
    configure(source, model_type="qwen3_5_moe")
    with pytest.raises(InputError, match=r"qwen3_5_moe.* language model is one part"):
        outline(open_checkpoint(source))


def test_weights_of_other_sizes_than_the_configuration_says_are_refused(source: Path) -> None:
    configure(source, hidden_size=64)
    with pytest.raises(InputError, match=CANNOT):
        load(source)


def test_tensors_that_the_model_does_not_use_are_named(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store_tensors(source, {**stored_tensors(source), "model.extra": torch.ones(2)})
    load(source)
    assert "qwen3_moe: 1 tensors are not used, such as model.extra" in caplog.text


@pytest.mark.parametrize("read", [load, lambda path: outline(open_checkpoint(path))])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "t5"}, "qwen3_moe is no causal language model but a t5"),
        ({"model_type": "vit"}, "qwen3_moe is no causal language model but a vit"),
        (
            {"model_type": "no_such_model"},
            r"config\.json is not understood: .*model type `no_such_model`",
        ),
        ({"model_type": None, "architectures": []}, r"config\.json is not understood: "),
        ({"hidden_size": "many"}, r"config\.json is not understood: .*'hidden_size'"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Config"}},
            r"config\.json is not understood: ",
        ),
    ],
)
def test_a_configuration_of_no_known_causal_language_model_is_refused(
    source: Path, read: Callable[[Path], object], fields: dict[str, Any], message: str
) -> None:
    configure(source, **fields)
    with pytest.raises(InputError, match=message):
        read(source)


def test_code_that_comes_with_a_checkpoint_is_never_run(source: Path) -> None:
    (source / "configuration_own.py").write_text("raise SystemExit('the code ran')")
    configure(source, auto_map={"AutoConfig": "configuration_own.Config"})
    assert load(source).config.model_type == "qwen3_moe"


def test_a_model_in_the_place_of_its_original_verifies(source: Path) -> None:
    verify(source, load(source))


@pytest.mark.parametrize(
    "key", ["model.layers.0.mlp.experts.5.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_verify_catches_one_changed_number(source: Path, key: str) -> None:
    model = load(source)
    tensors = stored_tensors(source)
    tensors[key][0, 0] += 1
    store_tensors(source, tensors)
    with pytest.raises(InputError, match=r"qwen3_moe does not give the model's .* when reloaded"):
        verify(source, model)


def test_verify_catches_a_change_in_an_expert_that_no_token_visits(
    saved_checkpoint: Callable[[str], Path],
) -> None:
    source = saved_checkpoint("gpt_oss")
    tensors = stored_tensors(source)
    tensors["model.layers.0.mlp.router.bias"][5] = -1000
    store_tensors(source, tensors)
    model = load(source)
    verify(source, model)
    tensors["model.layers.0.mlp.experts.down_proj"][5, 0, 0] += 1
    store_tensors(source, tensors)
    message = r"model's weights when reloaded \(model\.layers\.0\.mlp\.experts\.down_proj\)"
    with pytest.raises(InputError, match=message):
        verify(source, model)


def test_verify_catches_a_configuration_that_computes_something_else(source: Path) -> None:
    model = load(source)
    configure(source, num_experts_per_tok=3)
    message = r"does not give the model's logits when reloaded \(they differ by \d\.\de[-+]\d+\)"
    with pytest.raises(InputError, match=message):
        verify(source, model)


def test_a_full_disk_leaves_the_old_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out" / "compressed"
    save_pruned(source, target, 10)
    before = contents(target)
    monkeypatch.setattr(shutil, "disk_usage", full_disk)
    with pytest.raises(OSError, match=r"compressed needs 0\.00 GB and the disk has") as caught:
        save_pruned(source, target, 8)
    assert caught.value.errno == errno.ENOSPC
    assert contents(target) == before
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_that_does_not_reload_leaves_the_old_folder(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "compressed"
    save_pruned(source, target, 10)
    before, model = contents(target), load(source)
    # The original changes behind the back of the model.
    configure(source, rms_norm_eps=0.5)
    with pytest.raises(InputError, match="does not give the model's logits when reloaded"):
        save(model, open_checkpoint(source), target, manifest=MANIFEST, card=CARD)
    assert contents(target) == before
    assert list(target.parent.iterdir()) == [target]


def test_an_interrupted_save_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_smoe.models.saving.verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_pruned(source, tmp_path / "out" / "compressed", 8)
    assert not list((tmp_path / "out").iterdir())


def test_a_dense_model_is_not_saved(source: Path, tmp_path: Path) -> None:
    configure(source, mlp_only_layers=[0, 1, 2])
    model = outline(open_checkpoint(source))
    with pytest.raises(InputError, match="qwen3_moe"):
        find_moe_layers(model)
    with pytest.raises(InputError, match="qwen3_moe"):
        save(model, open_checkpoint(source), tmp_path / "out", manifest=MANIFEST, card=CARD)
    assert not (tmp_path / "out").exists()
