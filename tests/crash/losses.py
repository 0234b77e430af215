"""A crash at a failpoint, and then a loss that only what the crash left behind can make good.

A process that dies and comes back may have torn its memory without anybody noticing, as
long as nobody needs it.  Here somebody does, at once:

- `RETURNS`: a daemon dies at a failpoint, is started again and adopts what it finds; the
  moment it serves, *another* node is lost.  What that node held is decoded from the
  adopted images and parity.
- `PROTECTS`: as before, but the job protects a new step first, in the same generation.
- `LOST`: a trainer or a daemon dies at a failpoint, and its whole node with it.  What it
  held is decoded from what it had sent by then.

A daemon may be ended in order instead (`UPGRADE`): training goes on without it.

No recovery may go back behind the watermark that was known before, all ranks resume from
one step, and every loss and the final state are those of an uninterrupted control.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptd import failpoints
from ckptd.demo import cluster as demo_cluster
from ckptd.demo import story, strikes
from ckptd.demo.channels import serving
from ckptd.demo.children import Child
from ckptd.demo.cluster import READY_S, Node
from ckptd.demo.options import DemoOptions
from ckptd.demo.result import DemoResult
from ckptd.demo.scratch import Scratch
from ckptd.demo.strikes import BACK_S, Scene

UPGRADE = "upgrade"  # no failpoint: SIGTERM to a daemon
RETURNS = "its daemon returns, and another node is lost"
PROTECTS = "its daemon returns, a step is protected, and another node is lost"
LOST = "its node is lost"
NODES = 3  # with m = 1, parity is the sum of two nodes' data
_DIES_S = 30.0
_STEPS_WITHOUT = 2


@dataclass(frozen=True)
class Survived:
    """One blow that the job came back from."""

    name: str
    what: str
    watermark: int
    resumed: int
    rungs: frozenset[str]


class Losses:
    """Takes one job through `blows`, (failpoint, what follows) each; `survived` grows with them."""

    def __init__(self, directory: Path, blows: Sequence[tuple[str, str]], seed: int) -> None:
        self.survived: list[Survived] = []
        self._directory = directory
        self._blows = blows
        self._seed = seed
        self._chance = random.Random(seed)

    def run(self, monkeypatch: pytest.MonkeyPatch, steps: int) -> DemoResult:
        """The demo with these blows in the place of its strike."""
        real = demo_cluster.base_environment

        def environment(places: Scratch) -> dict[str, str]:
            # What dies here dies of a blow: a daemon that is held up on a busy machine is alive.
            return real(places) | {
                "CKPTD_FAILPOINTS": str(self._directory),
                "CKPTD_COORDINATOR_SILENCE_S": "30",
            }

        monkeypatch.setattr(demo_cluster, "base_environment", environment)
        monkeypatch.setattr(story, "STRIKES", {**strikes.STRIKES, "node": self._strike})
        options = DemoOptions(
            kill="node", nodes=NODES, parity=1, spares=1, seed=self._seed, steps=steps, fork_server=True
        )
        return story.run(options)

    async def _strike(self, scene: Scene) -> None:
        for name, what in self._blows:
            await self._protected(scene)
            victim, other = (scene.cluster.node_of(rank) for rank in self._chance.sample(range(NODES), 2))
            generation = scene.cluster.generation()
            scene.board.calm = what != LOST  # trainers may fail when a node is lost, and not before
            await self._die(scene, victim, name)
            if what != LOST:
                await self._return(scene, victim)
                if what == PROTECTS:
                    await scene.protected_anew()
                assert scene.cluster.generation() == generation, "training did not go on"
            await self._lose(scene, victim if what == LOST else other, name, what)

    async def _protected(self, scene: Scene) -> None:
        """Returns when this generation has protected a step of its own: till then m nodes may not go."""
        board, history = scene.board, scene.board.history

        def own() -> bool:
            start = history.resumed(max(history.generations()))
            return start is not None and (board.watermark or 0) > start

        await scene.step(history.reached() + 1)
        await board.until(own, BACK_S, "a step protected in this generation")

    async def _die(self, scene: Scene, victim: Node, name: str) -> None:
        if name == UPGRADE:
            await self._end(scene, victim)
        elif name in failpoints.TRAINER:
            (trainer,) = victim.launcher.living()
            await self._die_at(name, trainer.child)
        else:
            assert victim.daemon is not None
            victim.doomed = True
            if name in failpoints.STARTING:
                victim.daemon.send(signal.SIGKILL)
                await victim.daemon.wait()
                scene.cluster.start_daemon(victim)
            await self._die_at(name, victim.daemon)

    async def _end(self, scene: Scene, node: Node) -> None:
        """Ends a daemon in order, and returns when training has gone on without it."""
        assert node.daemon is not None
        node.doomed = True
        assert await node.daemon.end(grace_s=_DIES_S) == 0
        await scene.step(scene.board.history.reached() + _STEPS_WITHOUT)

    async def _die_at(self, name: str, process: Child) -> None:
        """Returns when the process has died at its failpoint, and nowhere else."""
        armed = self._directory / name
        scratch = armed.with_suffix(".part")
        scratch.write_text(str(process.pid))
        scratch.replace(armed)  # nobody reads half a number
        async with asyncio.timeout(_DIES_S):
            await process.wait()
        assert not armed.exists(), f"{process.name} died elsewhere than at {name}"

    async def _return(self, scene: Scene, node: Node) -> None:
        scene.cluster.start_daemon(node)
        await serving(node.channel, f"the daemon of {node.name}", READY_S)
        node.doomed = False  # not before: the end of the one before is still to be noticed

    async def _lose(self, scene: Scene, node: Node, name: str, what: str) -> None:
        """Takes a node with its memory, waits for the job, and brings the node back as an empty spare."""
        board, history, generation = scene.board, scene.board.history, scene.cluster.generation()
        board.calm, node.doomed = False, True
        watermark = board.watermark
        assert watermark is not None
        await scene.killer.strike([(pid, "SIGKILL") for pid in node.pids()], [node.memory])
        await board.until(
            lambda: scene._back(generation) is not None, BACK_S, f"the job after {name}, {what}"
        )
        board.calm = True
        newest = max(history.generations())
        resumed = history.resumed(newest)
        assert resumed is not None
        assert resumed >= watermark, f"{name}, {what}: {resumed} after {watermark} was protected"
        self.survived.append(Survived(name, what, watermark, resumed, frozenset(history.rungs(newest))))
        assert node.daemon is not None
        await node.daemon.wait()
        await self._return(scene, node)
