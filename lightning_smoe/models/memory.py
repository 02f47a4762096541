"""How much memory there is, and whether a model fits in it."""

from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def available_memory(device: torch.device | None = None) -> int | None:
    """Bytes that could be taken; none where the system does not say.

    Args:
        device: Where; none is main memory.
    """
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = _MEMINFO.read_text().splitlines() if _MEMINFO.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        # A container may be allowed less than the machine has.
        found.append(max(0, limit - used))
    return min(found, default=None)


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.exists() else "max"
    return int(text) if text.isdigit() else None
