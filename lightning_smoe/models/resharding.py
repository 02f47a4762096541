"""A checkpoint folder written again, bit for bit, in weight files of another size."""

import json
import shutil
from pathlib import Path

from lightning_smoe.models.artifact import replacing, require_space, sha256_of_file
from lightning_smoe.models.difference import as_bytes
from lightning_smoe.models.folder import MANIFEST, CheckpointFolder
from lightning_smoe.models.shards import Shard, ShardLayout, StoredTensor
from lightning_smoe.models.tensor_reader import TensorReader

_INDEX = "model.safetensors.index.json"
# What lies beside the weights and is not among a folder's other files.
_OWN = ("config.json", "README.md", "modeling_smoe.py", MANIFEST)


def write_resharded(folder: CheckpointFolder, target: Path, max_bytes: int) -> int:
    """Writes a folder again and returns the number of its weight files.

    One tensor is in memory at a time. Hashes that smoe.json notes follow the files.

    Args:
        folder: What to write again.
        target: Folder to write.
        max_bytes: Weights in one file at most.

    Raises:
        OSError: No space is left on the disk; nothing is written.
    """
    require_space(target, folder.num_bytes)
    tensors = {
        key: StoredTensor(entry["dtype"], tuple(entry["shape"]))
        for key, entry in folder.tensors.items()
    }
    layout = ShardLayout.of(tensors, max_bytes)
    with replacing(target) as partial:
        partial.mkdir()
        for path in [*folder.other_files, *(folder.path / name for name in _OWN)]:
            if path.exists():
                shutil.copyfile(path, partial / path.name)
        with TensorReader(folder) as stored:
            for shard in layout.shards:
                _write(shard, partial, stored)
        if layout.index is not None:
            (partial / _INDEX).write_text(layout.index, encoding="utf-8")
        _follow(folder, partial)
    return len(layout.shards)


def _write(shard: Shard, folder: Path, stored: TensorReader) -> None:
    with (folder / shard.name).open("wb") as file:
        file.write(shard.header)
        for key in shard.tensors:
            for piece in stored.pieces(key):
                file.write(as_bytes(piece).numpy().data)


def _follow(folder: CheckpointFolder, written: Path) -> None:
    """Notes the hashes of the files that were written, where the folder notes any."""
    if "files" in folder.manifest:
        files = sorted(p for p in written.iterdir() if p.name != MANIFEST)
        manifest = {**folder.manifest, "files": {p.name: sha256_of_file(p) for p in files}}
        (written / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
