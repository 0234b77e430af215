"""Real DTensors over gloo: what four ranks save in one layout, four ranks load in any other, or one
process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from dtensor_worker import SHAPES, wholes

import ckptd

WORLD = 4


def test_saved_and_loaded_across_layouts(tmp_path: Path) -> None:
    worker = Path(__file__).parent / "dtensor_worker.py"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
        "OMP_NUM_THREADS": "1"
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(tmp_path), str(rank), str(WORLD)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=90) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for process, (_, err) in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, err[-4000:]
    for stored in ("fsdp", "hsdp", "tp", "both", "fsdp-tp", "ddp"):
        into = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        checkpoint = ckptd.open(str(tmp_path / stored))
        assert checkpoint.verify() == []
        ckptd.load(str(tmp_path / stored), into, allow_unexpected=True)
        for name, whole in wholes().items():
            assert torch.equal(into[name], whole)
            assert torch.equal(checkpoint[name][1:2], whole[1:2])
    print(f"{outputs[0][0].split()[1]} pairs of layouts")
