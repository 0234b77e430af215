"""FSDP2, HSDP, FSDP2 with tensor parallelism and plain replicas: each loads into every other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
MIB = 1 << 20
UNEVEN = "6:fsdp-tp-3x2"  # the smallest where fully_shard does not store what its placements say


def matrix(directory: Path, deadline_s: int, every: int, *worlds: str) -> dict[str, Any]:
    """Runs matrix.py in a session of its own, of which nothing is left."""
    arguments = [directory, deadline_s, every, *worlds]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(HERE / "matrix.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=deadline_s + 15)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, err[-8000:]
    figures: dict[str, Any] = json.loads(out.splitlines()[-1])
    return figures


def check(figures: dict[str, Any]) -> None:
    """Says what was tried, and compares what was read with what was needed."""
    big = figures.pop("big")
    print(
        f"{figures['pairs']} pairs of layouts, {figures['loads']:,} loads by ranks, "
        f"{figures['tensors']:,} tensors compared bit by bit, "
        f"{figures['trained']} trained on ({figures['exact']} to the same bits); "
        f"{figures['save_s']} s to save, {figures['load_s']} s to load"
    )
    assert figures["pairs"] == figures["checkpoints"] ** 2
    assert figures["trained"] >= figures["checkpoints"] and figures["exact"] >= figures["checkpoints"]
    rows = max(rank["read"] / rank["needed"] for rank in big["rows"])
    grown = max(rank["grown"] for kind in big.values() for rank in kind)
    columns = max(rank["read"] / rank["needed"] for rank in big["columns"])
    print(
        f"{len(big['rows'])} ranks, {big['rows'][0]['needed'] // MIB} MiB each: rows read {rows:.3f} times "
        f"what they need, columns {columns:.3f} times; grew by {grown / MIB:.1f} MiB at most"
    )
    assert rows <= 1.1
    assert columns <= 2.1  # half of each row: the blocks that hold it
    assert grown <= 24 * MIB  # a copy of one rank's share would be 80 MiB


def test_every_layout_loads_into_every_other(tmp_path: Path) -> None:
    check(matrix(tmp_path, 90, 3, "1", "2", "4", UNEVEN))


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_every_layout_loads_into_every_other_at_all_sizes(tmp_path: Path) -> None:
    check(matrix(tmp_path, 850, 1, "1", "2", "3", "4", "6", "8"))
