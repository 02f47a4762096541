"""A checkpoint folder written again, bit for bit, in weight files of another size."""

import json
import shutil
from pathlib import Path

from lightning_smoe.errors import InputError
from lightning_smoe.models.artifact import replacing, require_space, sha256_of_file
from lightning_smoe.models.folder import MANIFEST, CheckpointFolder
from lightning_smoe.models.inventory import check_hashes
from lightning_smoe.models.shard_writer import ShardWriter
from lightning_smoe.models.shards import ShardLayout, StoredTensor
from lightning_smoe.models.tensor_reader import TensorReader

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
        InputError: The folder is not as it was written; it would look whole afterwards.
        OSError: No space is left on the disk; nothing is written.
    """
    require_space(target, folder.num_bytes)
    damage = check_hashes(folder, lambda _: None).wrong
    if damage:
        raise InputError(f"{folder.path}: {damage[0]}; copy or make the folder again")
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
        writer = ShardWriter(partial, layout)
        with TensorReader(folder) as stored:
            for key in stored.places:
                writer.write({key: stored.read(key)})
        writer.finish()
        _follow(folder, partial)
    return len(layout.shards)


def _follow(folder: CheckpointFolder, written: Path) -> None:
    """Notes the hashes of the files that were written, where the folder notes any."""
    noted = folder.manifest.get("files")
    if noted is not None:
        weights = set(written.glob("model*.safetensors*"))
        files = sorted(weights | {written / n for n in noted if (written / n).exists()})
        manifest = {**folder.manifest, "files": {p.name: sha256_of_file(p) for p in files}}
        (written / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
