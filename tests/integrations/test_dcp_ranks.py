"""FSDP2 jobs of 2 and 4 ranks: what DCP saves at one size comes back at the other, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptd.storage import catalog

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def launch(store: Path, world_size: int) -> dict[str, Any]:
    """Runs the worker; returns what its rank 0 found."""
    environment = {**os.environ, "CKPTD_STORE": str(store), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "dcp_worker.py"), str(store), str(world_size)]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the group is this launch's own
            process.wait()
    assert process.returncode == 0, said
    found: dict[str, Any] = json.loads((store / f"found-{world_size}.json").read_text())
    return found


def test_two_sizes_and_every_way_to_save_and_load(store: Path) -> None:
    two, four = launch(store, 2), launch(store, 4)
    assert two["saved"] != four["saved"]
    assert any("exp_avg_sq" in name for name in two["saved"])
    assert two["at 2"] == [two["saved"]] * 4
    assert four["at 4"] == [two["saved"]] * 4
    assert four["at 2"] == [four["saved"]] * 4
    print(f"{sum(len(found) for found in two['at 2'] + four['at 4'] + four['at 2'])} values compared")
    for job in ("universal", "dcp"):
        assert [entry.step for entry in catalog.entries(str(store), job)] == [3, 4]
