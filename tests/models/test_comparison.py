"""Where each expert of a compressed checkpoint came from, and what else is not the original's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_smoe.errors import InputError
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.comparison import (
    Comparison,
    compare_folders,
    config_differences,
    file_differences,
)
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.saving import save
from tests.models.pruning import (
    CARD,
    MANIFEST,
    last_experts,
    save_pruned,
    store_tensors,
    stored_tensors,
)
from tests.models.sharing import KEPT, save_shared

KEPT_EXPERTS = 8


def compare(folder: Path, original: Path) -> Comparison:
    return compare_folders(open_checkpoint(folder), open_checkpoint(original), lambda _: None)


def test_a_copy_is_equal_in_every_tensor(
    family: str, built_checkpoint: Callable[[str], Path]
) -> None:
    source = built_checkpoint(family)
    found = compare(source, source)
    assert all(layer.is_untouched for layer in found.layers)
    assert not found.left_out
    assert all(d.changed == d.other == 0 for d in found.roles.values())
    experts = sum(len(layer.origins) for layer in found.layers)
    assert found.roles["experts"].equal % experts == 0
    assert found.roles.keys() >= {"experts", "router", "attention", "norm", "other"}


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_the_origin_of_every_pruned_expert_is_found(
    family: str, built_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, target = built_checkpoint(family), tmp_path / "out"
    kept = [last_experts(x, KEPT_EXPERTS).tolist() for x in find_moe_layers(load(source))]
    save_pruned(source, target, KEPT_EXPERTS)
    found = compare(target, source)
    assert [list(layer.origins) for layer in found.layers] == kept
    for layer in found.layers:
        assert not any(layer.changed)
        assert (layer.num_experts, layer.rows_kept) == (12, KEPT_EXPERTS)
        assert layer.num_rows == KEPT_EXPERTS
    assert (found.roles["experts"].changed, found.roles["experts"].other) == (0, 0)
    assert found.roles["attention"].changed == 0
    assert not found.left_out


@torch.no_grad()
def test_what_a_refit_or_a_merge_changed_is_told_apart(
    built_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, target = built_checkpoint("qwen2_moe"), tmp_path / "out"
    model = load(source)
    first, second = find_moe_layers(model)
    first.select(torch.arange(4, 12))
    first.experts.down_proj[2] *= 1.5
    second.select(torch.arange(8))
    # Merged: the mean of the first two, in the place of the first.
    for stack in second.parameters_of("experts"):
        stack[0] = (stack[0] + stack[1]) / 2
    second.router.weight[3] += 1
    model.lm_head.weight[5, 7] += 0.25
    save(model, open_checkpoint(source), target, manifest=MANIFEST, card=CARD)
    found = compare(target, source)
    refitted, merged = found.layers
    assert refitted.origins == tuple(range(4, 12))
    assert [i for i, changed in enumerate(refitted.changed) if changed] == [2]
    assert refitted.changed[2] == ("down_proj.weight",)
    assert merged.origins == (None, 1, 2, 3, 4, 5, 6, 7)
    # Row 3 was moved; row 0 belongs to no single expert of the original.
    assert (merged.rows_kept, merged.num_rows) == (6, 8)
    experts, other = found.roles["experts"], found.roles["other"]
    assert (experts.equal, experts.changed, experts.other) == (44, 1, 3)
    assert experts.relative == pytest.approx(0.5)
    assert other.changed == 1
    assert other.largest == pytest.approx(0.25)


@torch.no_grad()
def test_experts_that_were_trained_are_compared_in_their_place(
    saved_checkpoint: Callable[[str], Path], built_checkpoint: Callable[[str], Path]
) -> None:
    source, target = built_checkpoint("mixtral"), saved_checkpoint("mixtral")
    tensors = stored_tensors(target)
    moved = [key for key in tensors if ".experts." in key]
    store_tensors(target, {k: 1.25 * t if k in moved else t for k, t in tensors.items()})
    found = compare(target, source)
    assert set(found.layers[0].origins) == {None}
    experts = found.roles["experts"]
    assert (experts.equal, experts.changed) == (0, len(moved))
    assert experts.relative == pytest.approx(0.25)


def test_rows_that_share_experts_are_all_the_originals(
    built_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, target = built_checkpoint("qwen2_moe"), tmp_path / "shared"
    save_shared(source, target)
    found = compare(target, source)
    assert [layer.origins for layer in found.layers] == [
        tuple(range(KEPT)),
        tuple(range(KEPT + 1)),
    ]
    assert {(layer.rows_kept, layer.num_rows) for layer in found.layers} == {(12, 12)}
    # The maps, which the original lacks.
    assert found.roles["other"].other == 2


def test_configuration_and_other_files_are_compared(
    built_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, target = built_checkpoint("qwen2_moe"), tmp_path / "out"
    save_pruned(source, target, KEPT_EXPERTS)
    (target / "tokenizer.json").write_text("{}")
    (target / "tokenizer_config.json").unlink()
    pair = open_checkpoint(target), open_checkpoint(source)
    assert config_differences(*pair) == ["num_experts: 12 -> 8"]
    assert file_differences(*pair) == {
        "generation_config.json": "equal",
        "tokenizer.json": "changed",
        "tokenizer_config.json": "not there",
    }


def test_what_the_checkpoint_leaves_out_is_named(
    saved_checkpoint: Callable[[str], Path], built_checkpoint: Callable[[str], Path]
) -> None:
    original = saved_checkpoint("qwen2_moe")
    tensors = stored_tensors(original)
    store_tensors(original, tensors | {"mtp.norm.weight": tensors["model.norm.weight"].clone()})
    assert compare(built_checkpoint("qwen2_moe"), original).left_out == ("mtp.norm.weight",)


def test_another_family_is_refused(built_checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=r"--original .*mixtral \(mixtral, 2 layers .* is not"):
        compare(built_checkpoint("olmoe"), built_checkpoint("mixtral"))
