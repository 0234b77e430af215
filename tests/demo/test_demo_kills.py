"""The demo itself, once for every kind of kill, through the command line.

Figures in seconds are printed always, and asserted with --soak only: a busy machine
must not fail a test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptd.demo import KILLS, example

SEED = 20
SOAK_SEEDS = range(5)
DEMO_S = 170.0
# What the issue promises.
LOST_STEPS_MAX = {"rank": 1}
LOST_STEPS_MAX_OTHERWISE = 2
DETECTED_MAX_S = {"node-silent": 1.5}
DETECTED_MAX_OTHERWISE_S = 0.2
OWN_MAX_S = 3.0


@pytest.fixture(scope="session")
def control_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all demos: equal seeds share one control run."""
    return tmp_path_factory.mktemp("control")


def demo(kill: str, seed: int, control_cache: Path, *more: str) -> tuple[dict[str, Any], str]:
    """The JSON object and the stderr of one demo that exited with 0."""
    argv = [sys.executable, "-m", "ckptd.cli.main", "demo", "--kill", kill, "--seed", str(seed), "--json"]
    ended = subprocess.run(
        [*argv, "--control-cache", str(control_cache), *more],
        env=os.environ | {"PYTHONPATH": str(example.PACKAGE_PARENT)},
        capture_output=True,
        text=True,
        timeout=DEMO_S,
    )
    print(ended.stderr)
    assert ended.returncode == 0, f"exit code {ended.returncode}"
    value: dict[str, Any] = json.loads(ended.stdout)
    print(json.dumps(value, indent=2))
    shown = ("lost_steps", "detected_s", "planned_s", "transferred_s", "restart_s", "identical")
    print(f"demo {kill}, seed {seed}: " + ", ".join(f"{name} {value[name]}" for name in shown))
    return value, ended.stderr


def check(kill: str, value: dict[str, Any]) -> None:
    """What holds on any machine, however slow."""
    assert value["identical"] is True
    assert value["final_digest"] == value["control_digest"]
    if kill != "daemon":  # without its daemon a rank waits for a while, and goes on unprotected
        assert value["lag_steps_max"] <= 3  # waits at 2; one more can be complete by then
    if kill == "none":
        assert value["killed_at_step"] is None
        return
    assert value["resumed_at_step"] <= value["killed_at_step"]
    assert value["lost_steps"] == value["killed_at_step"] - value["resumed_at_step"]
    assert value["lost_steps"] <= LOST_STEPS_MAX.get(kill, LOST_STEPS_MAX_OTHERWISE)
    assert value["rung"] == ("own-memory" if kill == "rank" else "parity")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("kill", KILLS)
def test_the_job_survives_and_not_one_bit_differs(kill: str, control_cache: Path) -> None:
    check(kill, demo(kill, SEED, control_cache, "--fork-server", "--steps", "40")[0])


@pytest.mark.soak
@pytest.mark.timeout(200)
@pytest.mark.parametrize("seed", SOAK_SEEDS)
@pytest.mark.parametrize("kill", KILLS)
def test_the_job_is_back_in_time(kill: str, seed: int, control_cache: Path) -> None:
    value, told = demo(kill, seed, control_cache)
    check(kill, value)
    if kill == "none":
        assert "suspected" not in told, "a false alarm"
    else:
        assert value["detected_s"] < DETECTED_MAX_S.get(kill, DETECTED_MAX_OTHERWISE_S)
        assert value["detected_s"] + value["planned_s"] + value["transferred_s"] <= OWN_MAX_S
