"""The reshard verb: the same checkpoint in weight files of another size."""

import re
from pathlib import Path

from rich.console import Console

from lightning_smoe.errors import InputError
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.resharding import write_resharded

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def reshard(checkpoint: str, output: Path, max_shard_size: str) -> None:
    """Writes a checkpoint again in other weight files, and says how many.

    Raises:
        InputError: The checkpoint is damaged, the output is there, or the size is none.
        OSError: No space is left on the disk; nothing is written.
    """
    max_bytes = bytes_of(max_shard_size)
    folder = open_checkpoint(checkpoint)
    if output.exists():
        raise InputError(f"--output {output} is there already; name another folder")
    source, target = folder.path.resolve(), output.resolve()
    if source in target.parents:
        raise InputError(f"--output {output} lies in {folder.path}; name another folder")
    count = write_resharded(folder, output, max_bytes)
    Console().print(f"Wrote {output}: {count} weight files", soft_wrap=True, highlight=False)


def bytes_of(size: str) -> int:
    """Bytes of a size such as 500MB, 2GB or 1000000.

    Raises:
        InputError: It is none, or nothing fits into it.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", size.strip().upper())
    count = int(float(found.group(1)) * _UNITS.get(found.group(2), 1)) if found else 0
    if count < 1:
        raise InputError(f"--max_shard_size {size} is no size; give one such as 500MB or 2GB")
    return count
