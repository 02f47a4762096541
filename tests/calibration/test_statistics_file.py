"""Statistics on disk: every bit back, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_smoe.calibration.sample import field_names
from lightning_smoe.calibration.statistics import (
    Statistics,
    read_header,
)
from lightning_smoe.errors import InputError
from tests.calibration.batches import (
    MANIFEST,
    gather,
    random_windows,
)
from tests.families import build


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe"])
def test_save_and_load_give_every_bit_back(family: str, stride: int, tmp_path: Path) -> None:
    found = gather(build(family), random_windows(), stride=stride)
    path = tmp_path / "new" / "statistics.safetensors"
    found.save(path)
    loaded = Statistics.load(path)
    assert list(loaded.layers) == list(found.layers)
    assert loaded.domains == found.domains
    assert loaded.manifest == found.manifest
    assert list(loaded.samples) == list(found.samples)
    for name, sums in found.layers.items():
        tensors = loaded.layers[name].tensors()
        assert tensors.keys() == sums.tensors().keys()
        for key, tensor in sums.tensors().items():
            assert tensors[key].dtype == tensor.dtype
            assert torch.equal(tensors[key], tensor)
        for key in field_names():
            ours, theirs = (getattr(each.samples[name], key) for each in (loaded, found))
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def test_loaded_layers_are_in_the_order_of_the_model(tmp_path: Path) -> None:
    found = gather(build("mixtral"), random_windows(2))
    name = next(iter(found.layers))
    names = [f"model.layers.{i}.mlp" for i in range(12)]
    layers = dict.fromkeys(names, found.layers[name])
    samples = dict.fromkeys(names, found.samples[name])
    many = Statistics(layers, samples, ("a",), MANIFEST)
    # The format stores no tensor twice.
    many = many.reduced(0, lambda tensor, _: tensor.clone())
    many.save(tmp_path / "statistics.safetensors")
    loaded = Statistics.load(tmp_path / "statistics.safetensors")
    assert list(loaded.layers) == list(loaded.samples) == names


def saved(path: Path) -> Path:
    gather(build("mixtral"), random_windows()).save(path)
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


def test_a_file_whose_sample_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "statistics.safetensors")
    tensors, header = load_file(path), {"manifest": MANIFEST.to_json(), "domains": ["a"]}
    for key in field_names():
        some = {name: tensor for name, tensor in tensors.items() if not name.endswith(key)}
        save_file(some, path, metadata={"statistics": json.dumps(header)})
        with pytest.raises(InputError, match=r"holds other sums .* delete it and calibrate again"):
            Statistics.load(path)


def test_sums_that_this_version_does_not_know_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    header = json.dumps({"manifest": MANIFEST.to_json(), "domains": ["a"]})
    for name in ("layer:new_sum", "layer:count", "weight"):
        tensors = {name: torch.zeros(1, 12, dtype=torch.int64)}
        save_file(tensors, path, metadata={"statistics": header})
        with pytest.raises(InputError, match=r"holds other sums .* delete it and calibrate again"):
            Statistics.load(path)
