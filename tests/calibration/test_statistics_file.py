"""Statistics on disk: every bit back, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_smoe.calibration.statistics import (
    Statistics,
    empty_sums,
    read_header,
)
from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import find_moe_layers
from tests.calibration.batches import (
    CPU,
    MANIFEST,
    gather,
    random_windows,
)
from tests.families import build


@pytest.mark.parametrize("all_experts", [False, True], ids=["routed", "all"])
@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe"])
def test_save_and_load_give_every_bit_back(family: str, all_experts: bool, tmp_path: Path) -> None:
    found = gather(build(family), random_windows(), all_experts)
    path = tmp_path / "new" / "statistics.safetensors"
    found.save(path)
    loaded = Statistics.load(path)
    assert list(loaded.layers) == list(found.layers)
    assert loaded.domains == found.domains
    assert loaded.manifest == found.manifest
    assert loaded.has_all_experts == all_experts
    for name, sums in found.layers.items():
        tensors = loaded.layers[name].tensors()
        assert tensors.keys() == sums.tensors().keys()
        for key, tensor in sums.tensors().items():
            assert tensors[key].dtype == tensor.dtype
            assert torch.equal(tensors[key], tensor)


def test_loaded_layers_are_in_the_order_of_the_model(tmp_path: Path) -> None:
    sums = empty_sums(find_moe_layers(build("mixtral"))[0], 1, False, CPU)
    names = [f"model.layers.{i}.mlp" for i in range(12)]
    Statistics(dict.fromkeys(names, sums), ("a",), MANIFEST).reduced(torch.clone).save(
        tmp_path / "statistics.safetensors"
    )
    assert list(Statistics.load(tmp_path / "statistics.safetensors").layers) == names


def saved(path: Path) -> Path:
    gather(build("mixtral"), random_windows(), False).save(path)
    return path


def test_the_header_is_read_without_the_tensors(tmp_path: Path) -> None:
    manifest, domains = read_header(saved(tmp_path / "statistics.safetensors"))
    assert manifest.step == "calibrate"
    assert domains == ("prose", "code")


def test_the_same_statistics_give_the_same_bytes(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{number}.safetensors") for number in range(4)]
    assert len({path.read_bytes() for path in paths}) == 1


@pytest.mark.parametrize("read", [read_header, Statistics.load])
@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_damaged_file_is_refused(read: Any, kept: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "statistics.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"is damaged .* delete it and calibrate again"):
        read(path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="holds no statistics; delete it and calibrate again"):
        Statistics.load(path)


def test_statistics_without_a_manifest_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata={"statistics": '{"domains": []}'})
    with pytest.raises(InputError, match="holds no statistics; delete it and calibrate again"):
        Statistics.load(path)


def test_sums_that_this_version_does_not_know_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    header = json.dumps({"manifest": MANIFEST.to_json(), "domains": ["a"]})
    for name in ("layer:new_sum", "layer:count", "weight"):
        tensors = {name: torch.zeros(1, 12, dtype=torch.int64)}
        save_file(tensors, path, metadata={"statistics": header})
        with pytest.raises(InputError, match=r"holds other sums .* delete it and calibrate again"):
            Statistics.load(path)
