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
WORLDS = (1, 2, 3, 4, 6, 8)
# Of each world FSDP2, HSDP and FSDP2 with tensor parallelism; fsdp-tp-3x2 is the smallest layout where
# fully_shard does not store what its placements say.
FEW = (
    "1",
    "2:ddp-2,fsdp-2,tp-2,hsdp-1x2,fsdp-tp-1x2",
    "3:fsdp-3,hsdp-3x1,fsdp-tp-1x3",
    "4:fsdp-4,fsdp-4-foreach,hsdp-2x2,fsdp-tp-2x2",
    "6:fsdp-6,hsdp-2x3,fsdp-tp-3x2",
    "8:fsdp-8,hsdp-4x2,fsdp-tp-4x2,hsdp-tp-2x2x2",
)


def matrix(directory: Path, deadline_s: int, pairs: str, *worlds: str) -> dict[str, Any]:
    """Runs matrix.py in a session of its own, of which nothing is left."""
    arguments = [directory, deadline_s, pairs, *worlds]
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
        f"{figures['pairs']} pairs of {figures['layouts']} layouts, world sizes {figures['worlds']}, "
        f"{figures['across']} pairs of sizes, {figures['kinds']} of kinds; "
        f"{figures['loads']:,} loads by ranks, {figures['tensors']:,} tensors compared bit by bit"
    )
    print(
        f"{figures['pairs']} trained on, {figures['exact']} of them to the same bits; losses of the others "
        f"differ by {figures['deviation']:.1e} at most; {figures['save_s']:.0f} s to save, "
        f"{figures['load_s']:.0f} s to load"
    )
    assert tuple(figures["worlds"]) == WORLDS and figures["across"] == len(WORLDS) ** 2
    assert figures["kinds"] == 6**2
    assert figures["pairs"] >= 2 * figures["layouts"] and figures["exact"] >= figures["layouts"]
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


@pytest.mark.timeout(300)
def test_every_layout_loads_what_others_saved_and_trains_on(tmp_path: Path) -> None:
    check(matrix(tmp_path, 270, "some", *FEW))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_layout_loads_what_every_layout_saved_and_trains_on(tmp_path: Path) -> None:
    figures = matrix(tmp_path, 3500, "all", *map(str, WORLDS))
    assert figures["pairs"] == figures["layouts"] ** 2
    check(figures)
