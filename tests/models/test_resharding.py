"""The same checkpoint in weight files of another size."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_smoe.errors import InputError
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.resharding import write_resharded
from lightning_smoe.reshard import bytes_of, reshard
from tests.models.pruning import contents, load_stock, stored_tensors
from tests.models.sharing import save_shared

LIMIT = 100_000


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def assert_same_tensors(folder: Path, wanted: Path) -> None:
    found, expected = stored_tensors(folder), stored_tensors(wanted)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)


def test_tensors_and_other_files_keep_every_bit(
    built_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "shared"
    save_shared(built_checkpoint("qwen2_moe"), source)
    count = write_resharded(open_checkpoint(source), tmp_path / "small", LIMIT)
    small = weights(tmp_path / "small")
    assert count == len(small) > 2
    assert_same_tensors(tmp_path / "small", source)
    for path in small:
        largest = max(t.numel() * 4 for t in stored_tensors(tmp_path / "small").values())
        assert path.stat().st_size < max(LIMIT, largest) + 20_000
    before, after = contents(source), contents(tmp_path / "small")
    kept = before.keys() - {"model.safetensors", "smoe.json"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    files = json.loads((tmp_path / "small" / "smoe.json").read_text())["files"]
    assert files == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "small").iterdir()
        if path.name not in ("smoe.json", "README.md")
    }
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        logits = load_stock(tmp_path / "small")(tokens).logits
        torch.testing.assert_close(logits, load(source)(tokens).logits, rtol=0, atol=0)
    # And back into one file, which then needs no index.
    reshard(str(tmp_path / "small"), tmp_path / "whole", "2GB")
    assert [path.name for path in weights(tmp_path / "whole")] == ["model.safetensors"]
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()
    assert_same_tensors(tmp_path / "whole", source)


def test_nothing_is_overwritten(built_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = built_checkpoint("qwen2_moe")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="there is there already; name another folder"):
        reshard(str(source), tmp_path / "there", "2GB")
    with pytest.raises(InputError, match=r"lies in .*qwen2_moe; name another folder"):
        reshard(str(source), source / "inside", "2GB")
    assert not (source / "inside").exists()


def test_a_folder_that_was_damaged_gets_no_new_hashes(
    built_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "shared"
    save_shared(built_checkpoint("qwen2_moe"), source)
    content = bytearray((source / "model.safetensors").read_bytes())
    content[-100] ^= 4
    (source / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors is not the file that was written"):
        reshard(str(source), tmp_path / "small", "2GB")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("size", "count"),
    [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5KB", 1500), ("77", 77), ("9B", 9)],
)
def test_sizes_are_read(size: str, count: int) -> None:
    assert bytes_of(size) == count


@pytest.mark.parametrize("size", ["", "GB", "0", "-1GB", "2GiB", "two", "0.1"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(InputError, match=r"--max_shard_size .* is no size; give one such as 500MB"):
        bytes_of(size)
