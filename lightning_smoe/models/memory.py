"""How much memory there is, and whether a model fits in it."""

from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
# What a container may take and has taken, in the second version of control groups and the first.
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
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
    for limit_name, used_name in _LIMITS:
        limit, used = _number(_CGROUP / limit_name), _number(_CGROUP / used_name)
        if limit is not None and used is not None:
            # A container may be allowed less than the machine has.
            found.append(max(0, limit - used + _cached((_CGROUP / used_name).parent)))
    return min(found, default=None)


def _cached(folder: Path) -> int:
    """Bytes of files that a container holds in memory and would give up, so that they are free."""
    path = folder / "memory.stat"
    fields = dict(line.split() for line in path.read_text().splitlines()) if path.exists() else {}
    names = ("active_file", "inactive_file")
    return sum(int(fields.get(f"total_{name}", fields.get(name, 0))) for name in names)


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.exists() else "max"
    return int(text) if text.isdigit() else None
