"""SIGKILL of a trainer or a daemon at every failpoint: what comes back is bit for bit what was there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from losses import LOST, Losses
from sweep import PAUSE, UPGRADE, Sweep

from ckptd import failpoints
from ckptd.demo import cluster as demo_cluster
from ckptd.demo import example
from ckptd.errors import DeadlineExceeded

PACKAGE = example.PACKAGE_PARENT / "ckptd"
# What CI takes: the places where the most is under way.
FEW = (
    "trainer.copying",
    "daemon.receiving",
    "trainer.copied",
    "daemon.folded",
    "daemon.releasing",
    UPGRADE,
    PAUSE,
)


def test_every_failpoint_stands_once_in_the_code_and_in_the_table() -> None:
    found = [
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r'failpoint\("([^"]+)"\)', path.read_text())
    ]
    assert sorted(found) == sorted(failpoints.NAMES)


def _survives(monkeypatch: pytest.MonkeyPatch, sweep: Sweep, seed: int, steps_per_death: int) -> None:
    # A daemon that comes back takes a second and more, in which training goes on.
    result = sweep.run(monkeypatch, seed, steps_per_death * len(sweep.names) + 10)
    assert sweep.done == sweep.names
    assert result.identical, result.different
    print(f"{len(sweep.done)} deaths, seed {seed}: every loss and the final state are those of the control")
    for name, watermark, resumed in sweep.resumed:
        print(f"  {name}: step {watermark} known to be protected, resumed from {resumed}")


@pytest.mark.timeout(240)
def test_deaths_at_failpoints_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _survives(monkeypatch, Sweep(tmp_path, FEW), seed=3, steps_per_death=14)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [4, 5])
def test_deaths_at_every_failpoint_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    names = failpoints.TRAINER + failpoints.DAEMON
    _survives(monkeypatch, Sweep(tmp_path, names), seed, steps_per_death=30)


# Every process of ckptd imports this first: one place for images and one for parity, used again at once.
_SINGLE_SLOT = """
import sys

class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "ckptd.daemon.node":
            sys.meta_path.remove(self)
            from ckptd.daemon import job_memory
            job_memory.free_slots = lambda arena, holdings, taken: [0]
            job_memory.JobMemory._free_parity_slots = lambda self, slots: [0]
        return None

sys.meta_path.insert(0, _Finder())
"""


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_single_slot_build_fails_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is lost while the next step is being copied over the last one."""
    patch, path = tmp_path / "patch", demo_cluster.python_path()
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(_SINGLE_SLOT)
    monkeypatch.setattr(demo_cluster, "python_path", lambda: os.pathsep.join([str(patch), path]))
    monkeypatch.setattr("losses.BACK_S", 30.0)
    losses = Losses(tmp_path, [("trainer.copying", LOST)] * 2, seed=6)
    with pytest.raises(DeadlineExceeded, match="unrecoverable") as failure:
        losses.run(monkeypatch, 40)
    print(f"1 slot: {len(losses.survived)} of 2 losses survived: {str(failure.value)[:250]}")
