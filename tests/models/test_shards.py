"""Weight files are, byte for byte, what safetensors writes, in whatever order they are filled."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.shard_writer import INDEX, ShardWriter
from lightning_smoe.models.shards import ShardLayout, StoredTensor
from tests.models.pruning import contents, load_stock, stored_tensors

TYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
MANY = 1500  # bytes of the test's tensors that make several files


def drawn(seed: int) -> dict[str, Tensor]:
    """Tensors of random types and shapes, empty ones and single numbers among them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    tensors = {}
    for index in range(draw(1, 40)):
        shape = [draw(0, 6) for _ in range(draw(0, 4))]
        values = torch.randn(shape, generator=generator) * 9
        # Hub keys are not always ASCII.
        tensors[f"layers.{index}.wéight"] = values.to(TYPES[draw(0, len(TYPES))])
    return tensors


def layout_of(tensors: dict[str, Tensor], max_bytes: int = MANY) -> ShardLayout:
    return ShardLayout.of({k: StoredTensor.of(t) for k, t in tensors.items()}, max_bytes)


def written(folder: Path, tensors: dict[str, Tensor]) -> dict[str, bytes]:
    writer = ShardWriter(folder, layout_of(tensors))
    writer.write(tensors)
    writer.finish()
    return contents(folder)


@pytest.mark.parametrize("seed", range(8))
def test_a_single_file_is_byte_for_byte_what_safetensors_writes(seed: int, tmp_path: Path) -> None:
    tensors = drawn(seed)
    writer = ShardWriter(tmp_path / "ours", layout_of(tensors, 10**9))
    writer.write(tensors)
    writer.finish()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    expected = (tmp_path / "theirs").read_bytes()
    assert contents(tmp_path / "ours") == {"model.safetensors": expected}


@pytest.mark.parametrize("seed", range(8))
def test_several_files_hold_every_tensor_in_its_type_and_bits(seed: int, tmp_path: Path) -> None:
    tensors = drawn(seed)
    written(tmp_path, tensors)
    for shard in layout_of(tensors).shards:
        found = load_file(tmp_path / shard.name)
        save_file(found, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / shard.name).read_bytes() == (tmp_path / "theirs").read_bytes()
        for key, tensor in found.items():
            assert tensor.dtype == tensors[key].dtype
            same = tensor.reshape(-1).view(torch.uint8), tensors[key].reshape(-1).view(torch.uint8)
            assert tensor.shape == tensors[key].shape
            assert torch.equal(*same)


@pytest.mark.parametrize("seed", range(2))
def test_order_of_writes_and_a_kill_in_the_middle_change_no_byte(seed: int, tmp_path: Path) -> None:
    tensors = drawn(seed)
    expected = written(tmp_path / "once", tensors)
    order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(seed))
    keys = [list(tensors)[place] for place in order.tolist()]
    half = len(keys) // 2
    for key in keys[:half]:
        ShardWriter(tmp_path / "killed", layout_of(tensors)).write({key: tensors[key]})
    writer = ShardWriter(tmp_path / "killed", layout_of(tensors))
    writer.write({key: tensors[key] for key in keys[half:]})
    writer.finish()
    assert contents(tmp_path / "killed") == expected


def test_files_fill_up_in_the_order_of_the_layers() -> None:
    names = [f"model.layers.{layer}.{part}" for layer in range(12) for part in ("a", "b")]
    tensors = {name: StoredTensor("BF16", (8, 2)) for name in reversed(names)}
    # Room for two layers and a half: no tensor is split, and none skips ahead.
    layout = ShardLayout.of(tensors, 5 * 32)
    assert [key for shard in layout.shards for key in shard.tensors] == names
    assert [len(shard.tensors) for shard in layout.shards] == [5, 5, 5, 5, 4]
    assert layout.shards[1].name == "model-00002-of-00005.safetensors"
    assert layout.num_bytes == sum(shard.num_bytes for shard in layout.shards)


def test_a_tensor_above_the_limit_has_a_file_to_itself() -> None:
    tensors = {"a": StoredTensor("F32", (1,)), "b": StoredTensor("F32", (99,))}
    tensors["c"] = tensors["a"]
    layout = ShardLayout.of(tensors, 8)
    assert [list(shard.tensors) for shard in layout.shards] == [["a"], ["b"], ["c"]]


def test_a_model_in_several_files_loads_in_stock_transformers(
    saved_checkpoint: Callable[[str], Path],
) -> None:
    folder = saved_checkpoint("mixtral")
    tensors, logits_of = stored_tensors(folder), load_stock(folder).state_dict()
    writer = ShardWriter(folder, layout_of(tensors, 200_000))
    assert not (folder / "model.safetensors").exists()
    writer.write(tensors)
    writer.finish()
    assert len(open_checkpoint(folder).shards) > 2
    for key, tensor in load_stock(folder).state_dict().items():
        assert torch.equal(tensor, logits_of[key])
    index = json.loads((folder / INDEX).read_text())
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"] == {"total_size": total}
    assert index["weight_map"].keys() == tensors.keys()
    with safe_open(folder / index["weight_map"]["lm_head.weight"], framework="pt") as file:
        assert torch.equal(file.get_tensor("lm_head.weight"), tensors["lm_head.weight"])


def test_files_of_another_layout_are_begun_anew(tmp_path: Path) -> None:
    old, new = drawn(1), drawn(2)
    expected = written(tmp_path / "fresh", new)
    written(tmp_path / "used", old)
    (tmp_path / "used/model.safetensors").write_bytes(b"truncated")
    assert written(tmp_path / "used", new) == expected


def test_a_file_cut_short_is_begun_anew(tmp_path: Path) -> None:
    tensors = drawn(3)
    expected = written(tmp_path, tensors)
    name = layout_of(tensors).shards[0].name
    os.truncate(tmp_path / name, 20)
    assert written(tmp_path, tensors) == expected


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"b": torch.zeros(2, 3)}, "b has no place in the files of"),
        ({"a": torch.zeros(3, 2)}, r"a is F32 of shape \(3, 2\) where .* F32 of shape \(2, 3\)"),
        ({"a": torch.zeros(2, 3).half()}, r"a is F16 of shape \(2, 3\) where .* for F32 of"),
        ({"a": torch.zeros(2, 3, dtype=torch.complex64)}, "no weights of type torch.complex64"),
    ],
)
def test_what_the_layout_does_not_name_is_refused(
    tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    writer = ShardWriter(tmp_path, ShardLayout.of({"a": StoredTensor("F32", (2, 3))}))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        writer.write({"a": torch.ones(2, 3), **tensors})
    assert contents(tmp_path) == before


def test_a_limit_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a shard of 0 bytes holds nothing; allow more"):
        ShardLayout.of({}, 0)


def test_a_full_disk_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        ShardWriter(tmp_path, layout_of(drawn(1)))
    assert caught.value.errno == errno.ENOSPC


def test_a_file_system_that_reserves_nothing_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    expected = written(tmp_path / "reserved", drawn(4))
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert written(tmp_path / "not", drawn(4)) == expected
