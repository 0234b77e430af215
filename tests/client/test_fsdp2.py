"""FSDP2 over gloo, two processes: shards are captured, come back, and training goes on bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fakedaemon import FakeDaemon
from fsdp_worker import CUT

HERE = Path(__file__).parent


def test_two_ranks_resume_their_shards(tmp_path: Path) -> None:
    daemons, processes = [], []
    directory = Path(os.path.relpath(tmp_path))  # a socket's path may have 107 bytes
    for rank in range(2):
        path = directory / f"s{rank}"
        # One fake daemon per rank: each has one rank's schedule.
        daemons.append(FakeDaemon(path, due=[CUT]))
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(HERE / "fsdp_worker.py"), str(path), str(tmp_path / "meeting")]
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        said = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for daemon in daemons:
            daemon.stop()
    for process, (out, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err
        found = json.loads(out.splitlines()[-1])
        assert found["step"] == CUT
        assert found["ddp names"]
        assert found["same at the cut"] and found["same at the end"] and found["cut differs from end"], found
        assert "optimizer.1.0.weight.exp_avg" in found["names"]
        assert "sharded in another way" in found["refused"] or "does not fit" in found["refused"]
    for daemon in daemons:
        assert (daemon.captured, daemon.complaints) == ([CUT], [])
