"""The killer: strikes what it is told to, when it is told to, and removes nothing else."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from ckptd.demo import blows, killer
from ckptd.demo.blows import Killer
from ckptd.demo.children import Child, Children
from ckptd.demo.options import DemoFailed

SLEEPER = [sys.executable, "-I", "-c", "import time; time.sleep(60)"]


def sleeper(group: Children) -> Child:
    return group.spawn("sleeper", SLEEPER, os.environ)


def test_victims_die_at_the_time_drawn_and_their_memory_is_gone(tmp_path: Path) -> None:
    node = tmp_path / "ckptd-demo-7-x" / "node1"
    (node / "job").mkdir(parents=True)
    (node / "job" / "rank0.arena").write_bytes(b"x" * 100)

    async def body() -> tuple[float, float, list[int]]:
        async with Children(tmp_path, tmp_path) as group:
            hand, victims, bystander = (
                Killer(group, os.environ),
                [sleeper(group), sleeper(group)],
                sleeper(group),
            )
            asked_s = time.monotonic()
            struck_s = await hand.strike([(v.pid, "SIGKILL") for v in victims], [node], delay_s=0.1)
            statuses = [await victim.wait() for victim in victims]
            assert bystander.alive
            hand.close()
            return asked_s, struck_s, statuses

    asked_s, struck_s, statuses = asyncio.run(body())
    assert struck_s >= asked_s + 0.1
    assert statuses == [-9, -9]
    assert not node.exists()
    assert node.parent.exists()


def test_stopped_processes_can_be_continued(tmp_path: Path) -> None:
    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    async def body() -> None:
        async with Children(tmp_path, tmp_path) as group:
            hand, victim = Killer(group, os.environ), sleeper(group)
            await hand.strike([(victim.pid, "SIGSTOP")])
            async with asyncio.timeout(10):
                while state(victim.pid) != "T":
                    await asyncio.sleep(0.01)
            await hand.strike([(victim.pid, "SIGCONT")])
            async with asyncio.timeout(10):
                while state(victim.pid) == "T":
                    await asyncio.sleep(0.01)
            hand.close()

    asyncio.run(body())


def test_a_victim_that_was_gone_is_an_error(tmp_path: Path) -> None:
    async def body() -> None:
        async with Children(tmp_path, tmp_path) as group:
            hand, victim = Killer(group, os.environ), sleeper(group)
            await victim.end(0.0)
            await hand.strike([(victim.pid, "SIGKILL")])

    with pytest.raises(DemoFailed, match="gone before the strike"):
        asyncio.run(body())


@pytest.mark.parametrize("name", ["data", "ckptd-demo-7-x", "ckptd-demo-7-x/node1/job"])
def test_only_a_demos_node_memory_is_removed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match="it stays"):
        killer.strike({"at_s": 0.0, "signals": [], "remove": [str(path)]})
    assert path.exists()


def test_a_seed_draws_the_same_again_and_seeds_reach_every_rank_and_moment() -> None:
    draws = [blows.draw("node", seed, ranks=4, victims=2) for seed in range(200)]
    assert draws == [blows.draw("node", seed, ranks=4, victims=2) for seed in range(200)]
    assert {rank for choice in draws for rank in choice.ranks} == {0, 1, 2, 3}
    assert all(len(set(choice.ranks)) == 2 for choice in draws)
    moments = sorted(choice.at for choice in draws)
    assert moments[0] < 0.05
    assert moments[-1] > 0.95
    assert draws[0] != blows.draw("rank", 0, ranks=4, victims=2)
