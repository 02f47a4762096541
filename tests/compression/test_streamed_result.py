"""Compression from one folder of files to another: the same bytes as in memory, also cut off."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_smoe.compression.carry_out import carry_out, carry_out_streamed
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.streamed_result import StreamedResult
from lightning_smoe.errors import InputError
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import LogSumExp, Slice
from lightning_smoe.functional.router_rows import Map
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.folder import CheckpointFolder, open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.progress import WalkProgress, parts_of
from lightning_smoe.models.saving import save, write_beside
from lightning_smoe.models.streamed import Streamed
from tests.calibration.batches import WindowData, random_windows
from tests.compression.plans import KEPT, MERGED, plan_for, trainer
from tests.families import FAMILIES

MANIFEST = Manifest("compress", {"checkpoint": "abc"})
TEXT = random_windows(20)
PLANS: dict[str, tuple[Any, dict[str, Any]]] = {
    "pruned": (KEPT, {"router": Slice()}),
    "merged": (MERGED, {"router": LogSumExp(), "refit": Refit()}),
    "mapped": (MERGED, {"router": Map(), "refit": Refit(correct_drift=False)}),
}


def plan_of(source: CheckpointFolder, kind: str, num_layers: int = 9) -> CompressionPlan:
    groups, settings = PLANS[kind]
    layers = find_moe_layers(load(source.path))[:num_layers]
    return plan_for(layers, groups, **settings)


def in_memory(source: CheckpointFolder, plan: CompressionPlan, target: Path) -> None:
    model = load(source.path)
    carry_out(trainer(), WindowData(TEXT), model, plan, samples={})
    save(model, source, target, manifest=MANIFEST, card="a card")


def streamed(source: CheckpointFolder, plan: CompressionPlan, target: Path) -> None:
    cpu = torch.device("cpu")
    residence = Streamed(source)
    progress = WalkProgress(target, MANIFEST.digest)
    sink = StreamedResult(residence, source, plan, target, progress=progress, device=cpu)
    carry_out_streamed(trainer(), WindowData(TEXT), residence, plan, samples={}, sink=sink)

    def beside(folder: Path) -> None:
        write_beside(folder, source, config=sink.config, manifest=MANIFEST, card="a card")

    sink.complete(beside, torch.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("family", "kind"),
    [("deepseek_v3", "pruned"), ("gpt_oss", "merged"), *((f, "mapped") for f in FAMILIES)],
)
def test_a_folder_is_the_same_bytes_however_the_model_is_held(
    built_checkpoint: Callable[[str], Path], family: str, kind: str, tmp_path: Path
) -> None:
    source = open_checkpoint(built_checkpoint(family))
    plan = plan_of(source, kind)
    in_memory(source, plan, tmp_path / "whole")
    streamed(source, plan, tmp_path / "walked")
    assert contents(tmp_path / "walked") == contents(tmp_path / "whole")
    assert not parts_of(tmp_path / "walked").exists()


@pytest.mark.parametrize("kind", ["pruned", "mapped"])
def test_layers_that_the_plan_leaves_alone_are_written_too(
    built_checkpoint: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    source = open_checkpoint(built_checkpoint("qwen2_moe"))
    plan = plan_of(source, kind, num_layers=1)
    in_memory(source, plan, tmp_path / "whole")
    streamed(source, plan, tmp_path / "walked")
    assert contents(tmp_path / "walked") == contents(tmp_path / "whole")


class CutOffError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("behind", [True, False])
def test_a_run_that_was_cut_off_at_a_layer_goes_on_there(
    built_checkpoint: Callable[[str], Path],
    at: int,
    behind: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = open_checkpoint(built_checkpoint("qwen2_moe"))
    plan = plan_of(source, "mapped")
    streamed(source, plan, tmp_path / "whole")
    put, seen = StreamedResult.put, list[int]()

    def watched(sink: StreamedResult, index: int, decoder: nn.Module, *rest: Any) -> None:
        seen.append(index)
        if len(seen) == at + 1 and not behind:
            raise CutOffError
        put(sink, index, decoder, *rest)
        if len(seen) == at + 1:
            raise CutOffError

    monkeypatch.setattr(StreamedResult, "put", watched)
    with pytest.raises(CutOffError):
        streamed(source, plan, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    streamed(source, plan, tmp_path / "cut")
    assert seen[at + 1 :] == [*range(at + behind, 3)]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_folder_that_reads_back_otherwise_is_not_kept(
    built_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(built_checkpoint("mixtral"))
    plan = plan_of(source, "pruned")
    target = "lightning_smoe.models.streamed_folder.ShardWriter.finish"

    def flip(writer: Any) -> None:
        file = writer.folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 64
        file.write_bytes(content)

    monkeypatch.setattr(target, flip)
    with pytest.raises(InputError, match="does not give the model's weights"):
        streamed(source, plan, tmp_path / "walked")
    assert not (tmp_path / "walked").exists()
