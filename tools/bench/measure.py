"""What the benchmarks share: medians, CPU seconds of processes, JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """Median, 99th percentile, least, greatest, and how many; of no values, a count of 0."""
    if not values:
        return {"count": 0}
    array = np.asarray(values)
    return {
        "median": float(np.median(array)),
        "p99": float(np.percentile(array, 99)),
        "min": float(array.min()),
        "max": float(array.max()),
        "count": len(values),
    }


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of these processes so far, their threads included; dead ones count 0."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS_PER_S


def children_of(pid: int) -> list[int]:
    """All living descendants of a process."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, left = [], [pid]
    while left:
        mine = parents.get(left.pop(), [])
        found += mine
        left += mine
    return found


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def emit(result: dict[str, Any]) -> None:
    """The result, on stdout."""
    print(json.dumps({"version": 1, **result}, indent=2))


def machine() -> dict[str, Any]:
    """Where this was measured."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown",
    )
    return {"cpus": os.cpu_count(), "cpu": model, "kernel": os.uname().release}
