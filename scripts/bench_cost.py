"""What a process costs beyond its start: CPU-seconds and peak memory. Needs Python alone."""

import json
import re
import time
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Cost:
    """Counts from where it is made, behind all imports; Linux only."""

    def __init__(self) -> None:
        # The high-water mark of memory starts anew.
        _CLEAR.write_text("5")
        self._start = self._last = time.process_time()
        self._memory = _megabytes("VmRSS")
        self._parts: dict[str, float] = {}

    def note(self, part: str) -> None:
        """Says what the time since the last note went into."""
        now = time.process_time()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def tell(self) -> None:
        """Prints one line of JSON, which `told` reads."""
        seconds = time.process_time() - self._start
        peak = _megabytes("VmHWM") - self._memory
        print(json.dumps({"seconds": seconds, "megabytes": peak, "parts": self._parts}))


def told(output: str) -> dict[str, object]:
    """Reads what `Cost.tell` printed, as the last line of a process."""
    found: dict[str, object] = json.loads(output.strip().splitlines()[-1])
    return found


def _megabytes(field: str) -> float:
    match = re.search(rf"{field}:\s*(\d+) kB", _STATUS.read_text())
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match.group(1)) * 1024 / 1e6
