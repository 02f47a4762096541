"""Statistics gathered a decoder layer at a time: the same bytes, also after the run was cut off."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lightning_smoe.calibration.module import CalibrationModule, ExpertStatistics
from lightning_smoe.calibration.walked import WalkedCalibration
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.progress import WalkProgress, parts_of
from lightning_smoe.models.residence import InMemory, Residence
from lightning_smoe.models.streamed import Streamed
from tests.calibration.batches import DOMAINS, MANIFEST, WindowData, predict, random_windows
from tests.families import FAMILIES


def gather(residence: Residence, path: Path, **options: object) -> None:
    """Writes the statistics of the text, walking over decoder layers."""
    progress = WalkProgress(path, MANIFEST.digest)
    module = WalkedCalibration(residence, DOMAINS, MANIFEST, progress=progress, stride=3)
    predict(module, WindowData(random_windows()), **options)
    assert module.statistics is not None
    module.statistics.save(path)


def gather_whole(model: PreTrainedModel, path: Path, **options: object) -> None:
    """Writes the statistics of the text, with the whole model in memory."""
    watch = ExpertStatistics(DOMAINS, MANIFEST, stride=3)
    predict(CalibrationModule(model), WindowData(random_windows()), watch, **options)
    watch.statistics.save(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_the_same_bytes_however_the_model_is_held(
    built_checkpoint: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    folder, whole, walked = (
        open_checkpoint(built_checkpoint(family)),
        tmp_path / "whole",
        tmp_path / "walked",
    )
    gather_whole(load(folder.path), whole)
    gather(Streamed(folder), walked)
    assert walked.read_bytes() == whole.read_bytes()
    gather(InMemory(load(folder.path)), walked)
    assert walked.read_bytes() == whole.read_bytes()


def test_mixed_precision_is_the_same_too(
    built_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = open_checkpoint(built_checkpoint("qwen2_moe"))
    gather_whole(load(folder.path), tmp_path / "whole", precision="bf16-mixed")
    gather(Streamed(folder), tmp_path / "walked", precision="bf16-mixed")
    assert (tmp_path / "walked").read_bytes() == (tmp_path / "whole").read_bytes()


class CutOffError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_run_that_was_cut_off_at_a_layer_goes_on_there(
    built_checkpoint: Callable[[str], Path],
    at: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, path = open_checkpoint(built_checkpoint("deepseek_v3")), tmp_path / "statistics"
    gather(Streamed(folder), tmp_path / "whole")
    read: list[int] = []
    hold = Streamed.layer

    def watched(residence: Streamed, index: int, device: object) -> object:
        read.append(index)
        if len(read) == at + 1:
            raise CutOffError
        return hold(residence, index, device)  # type: ignore[arg-type]  # handed through

    monkeypatch.setattr(Streamed, "layer", watched)
    with pytest.raises(CutOffError):
        gather(Streamed(folder), path)
    gather(Streamed(folder), path)
    assert read[at + 1 :] == [*range(at, 3)]
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_was_noted_for_other_statistics_is_dropped(tmp_path: Path) -> None:
    artifact = tmp_path / "statistics"
    first = WalkProgress(artifact, "one")
    assert first.open() == 0
    first.note(1, {})
    assert WalkProgress(artifact, "one").open() == 1
    assert WalkProgress(artifact, "one", num_processes=2).open() == 0
    assert WalkProgress(artifact, "other").open() == 0
    assert not list(parts_of(artifact).glob("states*"))


def test_other_batches_and_states_that_were_damaged_are_not_gone_on_with(tmp_path: Path) -> None:
    artifact = tmp_path / "statistics"
    progress = WalkProgress(artifact, "one", text=["abc", 4])
    progress.open()
    for done in (1, 2):
        progress.note(done, {"0": torch.full((3,), float(done))})
    assert WalkProgress(artifact, "one", text=["abc", 4]).open() == 2
    path = parts_of(artifact) / "states-00002-0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert WalkProgress(artifact, "one", text=["abc", 4]).open() == 1
    path.write_bytes(content[:-4])
    assert WalkProgress(artifact, "one", text=["abc", 4]).open() == 1
    assert WalkProgress(artifact, "one", text=["abc", 2]).open() == 0
