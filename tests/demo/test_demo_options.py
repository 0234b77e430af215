"""The demo's options, its places, and what dead demos left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.demo import KILLS, DemoOptions, scratch
from ckptd.errors import InvalidRequest, NoSpace


@pytest.mark.parametrize("kill", KILLS)
def test_every_kill_works_with_its_defaults(kill: str) -> None:
    resolved = DemoOptions(kill=kill, seed=3).resolved()
    lost = 2 if kill == "two-nodes" else 1
    assert (resolved.nodes, resolved.parity, resolved.spares) == (4, lost, lost)
    assert resolved.seed == 3


def test_without_a_seed_one_is_drawn() -> None:
    seeds = {DemoOptions().resolved().seed for _ in range(5)}
    assert len(seeds) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DemoOptions(kill="moon"), "choose one of none, rank"),
        (DemoOptions(nodes=1), "--nodes 1 with --parity 1"),
        (DemoOptions(kill="two-nodes", nodes=2), "more than 2"),
        (DemoOptions(nodes=100), "at most 32"),
        (DemoOptions(spares=99), "--spares 99"),
        (DemoOptions(steps=5), "at least 20 steps"),
        (DemoOptions(kill="daemon", steps=30), "at least 40 steps"),
        (DemoOptions(seed=-1), "--seed -1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: DemoOptions, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        options.resolved()


def test_too_little_memory_is_refused_with_the_numbers(tmp_path: Path) -> None:
    many = DemoOptions(nodes=32).resolved()

    class Full:
        f_bavail, f_frsize = 10, 1 << 20

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: Full)
        with pytest.raises(NoSpace, match=r"33 nodes need \d+ MiB, 10 MiB are free.*--shm-size"):
            scratch.check_space(many, tmp_path)


def test_the_demo_fits_into_dockers_64_mib(tmp_path: Path) -> None:
    class Docker:
        f_bavail, f_frsize = 64, 1 << 20

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: Docker)
        scratch.check_space(DemoOptions(kill="node").resolved(), tmp_path)


def test_only_the_memory_of_dead_demos_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-I", "-c", "pass"])
    ended.wait()
    dead = tmp_path / f"ckptd-demo-{ended.pid}-a"
    living = tmp_path / f"ckptd-demo-{os.getpid()}-b"
    locked = tmp_path / f"ckptd-demo-{ended.pid}-c"
    foreign = tmp_path / "ckptd-demo-x"
    for path in (dead, living, locked, foreign):
        (path / "node0").mkdir(parents=True)
    lock = scratch._locked(locked)
    try:
        assert scratch.remove_stale(tmp_path) == [dead]
    finally:
        os.close(lock)
    assert living.exists()
    assert foreign.exists()
    assert scratch.remove_stale(tmp_path) == [locked]


def test_places_are_gone_afterwards_but_logs_of_a_failure_stay() -> None:
    resolved = DemoOptions(seed=0).resolved()
    with scratch.scratch(resolved) as places:
        assert places.memory.is_dir()
        assert places.logs.is_dir()
        places.keep_logs = False
    assert not places.memory.exists()
    assert not places.root.exists()
    with pytest.raises(InvalidRequest), scratch.scratch(resolved) as failed:
        raise InvalidRequest("anything")
    assert not failed.memory.exists()
    assert failed.logs.exists()
    failed.logs.rmdir()
    failed.root.rmdir()
    with pytest.raises(KeyboardInterrupt), scratch.scratch(resolved) as interrupted:
        raise KeyboardInterrupt
    assert not interrupted.root.exists()
