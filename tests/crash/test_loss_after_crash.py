"""After a crash at a failpoint a node is lost, and nothing that was protected: see losses.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from losses import LOST, PROTECTS, RETURNS, UPGRADE, Losses

from ckptd import failpoints

Blow = tuple[str, str]
# Training goes on for as long as a daemon takes to start.
STEPS = {RETURNS: 14, PROTECTS: 20, LOST: 8}
STEPS_AFTERWARDS = 6
EVERY: list[Blow] = [
    (UPGRADE, RETURNS),
    (UPGRADE, PROTECTS),
    *((name, RETURNS) for name in failpoints.STARTING + failpoints.DAEMON),
    *((name, LOST) for name in failpoints.TRAINER + failpoints.DAEMON),
]
BATCH = 5
# What CI takes: a record that lacks its last fact, and a contribution that ends in the middle.
FEW: list[Blow] = [("daemon.folded", RETURNS), ("daemon.sending", LOST), (UPGRADE, PROTECTS)]


def _steps(blows: Sequence[Blow]) -> int:
    return sum(STEPS[what] for _, what in blows) + STEPS_AFTERWARDS


def _survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blows: Sequence[Blow], seed: int) -> None:
    losses = Losses(tmp_path, blows, seed)
    result = losses.run(monkeypatch, _steps(blows))
    for one in losses.survived:
        print(f"  {one.name}, {one.what}: step {one.watermark} was protected, resumed from {one.resumed}")
    assert [(one.name, one.what) for one in losses.survived] == list(blows)
    assert all("parity" in one.rungs for one in losses.survived), "nothing was decoded"
    assert result.identical, result.different
    print(f"{len(blows)} losses after crashes, seed {seed}: losses and final state are those of the control")


@pytest.mark.timeout(200)
def test_a_loss_after_a_crash_costs_nothing_protected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _survives(tmp_path, monkeypatch, FEW, seed=7)


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [8, 9])
@pytest.mark.parametrize("first", range(0, len(EVERY), BATCH))
def test_a_loss_after_a_crash_at_every_failpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, seed: int
) -> None:
    _survives(tmp_path, monkeypatch, EVERY[first : first + BATCH], seed)
