"""SIGKILL of a trainer or a daemon at every failpoint: what comes back is bit for bit what was there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sweep import Sweep

from ckptd import failpoints
from ckptd.demo import example
from ckptd.demo.options import DemoFailed

PACKAGE = example.PACKAGE_PARENT / "ckptd"
STEPS_PER_DEATH = 10
# What CI takes: the places where the most is under way.
FEW = ("trainer.copying", "daemon.receiving", "trainer.copied", "daemon.folded", "daemon.releasing")


def test_every_failpoint_stands_once_in_the_code_and_in_the_table() -> None:
    found = [
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r'failpoint\("([^"]+)"\)', path.read_text())
    ]
    assert sorted(found) == sorted(failpoints.NAMES)


def _survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: Sweep, seed: int) -> None:
    result = sweep.run(monkeypatch, seed, STEPS_PER_DEATH * len(sweep.names) + 10)
    assert sweep.done == sweep.names
    assert result.identical, result.different
    print(
        f"{len(sweep.done)} deaths at failpoints, seed {seed}: losses and final state are those of the control"
    )
    for name, watermark, resumed in sweep.resumed:
        print(f"  {name}: step {watermark} known to be protected, resumed from {resumed}")


@pytest.mark.timeout(240)
def test_deaths_at_failpoints_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _survives(tmp_path, monkeypatch, Sweep(tmp_path, FEW), seed=3)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [4, 5])
def test_deaths_at_every_failpoint_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    names = failpoints.TRAINER + failpoints.DAEMON
    _survives(tmp_path, monkeypatch, Sweep(tmp_path, names, rounds=2), seed)


# Every process of ckptd imports this first: one image slot and one parity slot, used again at once.
_SINGLE_SLOT = """
import sys

class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "ckptd.daemon.job_memory":
            sys.meta_path.remove(self)
            import ckptd.memory.holding as holding
            holding.free_slots = lambda arena, holdings, taken: [0]
        return None

sys.meta_path.insert(0, _Finder())
"""


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_single_slot_build_fails_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(_SINGLE_SLOT)
    armed = tmp_path / "armed"
    armed.mkdir()
    sweep = Sweep(armed, ["trainer.copying"] * 3)
    monkeypatch.setattr("ckptd.demo.strikes.BACK_S", 30.0)
    with pytest.raises((DemoFailed, AssertionError, TimeoutError)) as failure:
        result = sweep.run(monkeypatch, 6, 60, python_path=tmp_path / "patch")
        assert result.identical, result.different
    print(f"1 slot: after {len(sweep.done)} deaths: {str(failure.value)[:300]}")
