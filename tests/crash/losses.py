"""A crash at a failpoint, and then a loss that only what the crash left behind can make good.

A process that dies and comes back may have torn its memory without anybody noticing, as
long as nobody needs it.  Here somebody does, at once:

- `RETURNS`: a daemon dies at a failpoint, is started again and adopts what it finds; the
  moment it serves, *another* node is lost.  What that node held is decoded from the
  adopted images and parity.
- `LOST`: a trainer or a daemon dies at a failpoint, and its whole node with it.  What it
  held is decoded from what it had sent by then.

No recovery may go back behind the watermark that was known before, all ranks resume from
one step, and every loss and the final state are those of an uninterrupted control.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptd import failpoints
from ckptd.demo import cluster as demo_cluster
from ckptd.demo import story, strikes
from ckptd.demo.channels import serving
from ckptd.demo.cluster import READY_S, Node
from ckptd.demo.options import DemoOptions
from ckptd.demo.result import DemoResult
from ckptd.demo.scratch import Scratch
from ckptd.demo.strikes import BACK_S, Scene

RETURNS = "its daemon returns, and another node is lost"
LOST = "its node is lost"
NODES = 3  # with m = 1, parity is the sum of two nodes' data
_DIES_S = 30.0


@dataclass(frozen=True)
class Survived:
    """One blow that the job came back from."""

    name: str
    what: str
    watermark: int
    resumed: int
    rungs: frozenset[str]


class Losses:
    """Takes one job through `blows`, (failpoint, RETURNS or LOST) each; `survived` grows with them."""

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
            return real(places) | {"CKPTD_FAILPOINTS": str(self._directory)}

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
            scene.board.calm = False
            await self._die_at(name, victim)
            if what == RETURNS:
                await self._return(scene, victim)
                lost = other
            else:
                lost = victim
            await self._lose(scene, lost, name, what)

    async def _protected(self, scene: Scene) -> None:
        """Returns when this generation has protected a step of its own: till then m nodes may not go."""
        board, history = scene.board, scene.board.history

        def own() -> bool:
            start = history.resumed(max(history.generations()))
            return start is not None and (board.watermark or 0) > start

        await scene.step(history.reached() + 1)
        await board.until(own, BACK_S, "a step protected in this generation")

    async def _die_at(self, name: str, victim: Node) -> None:
        """Returns when the process has died at its failpoint, and nowhere else."""
        if name in failpoints.TRAINER:
            (trainer,) = victim.launcher.living()
            process = trainer.child
        else:
            assert victim.daemon is not None
            victim.doomed = True
            process = victim.daemon
        armed = self._directory / name
        scratch = armed.with_suffix(".part")
        scratch.write_text(str(process.pid))
        scratch.replace(armed)  # nobody reads half a number
        async with asyncio.timeout(_DIES_S):
            await process.wait()
        assert not armed.exists(), f"{process.name} died elsewhere than at {name}"

    async def _return(self, scene: Scene, node: Node) -> None:
        scene.cluster.start_daemon(node)
        node.doomed = False
        await serving(node.channel, f"the daemon of {node.name}", READY_S)

    async def _lose(self, scene: Scene, node: Node, name: str, what: str) -> None:
        """Takes a node with its memory, waits for the job, and brings the node back as an empty spare."""
        board, history, generation = scene.board, scene.board.history, scene.cluster.generation()
        board.calm, node.doomed = False, True
        watermark = board.watermark
        assert watermark is not None
        await scene.killer.strike([(pid, "SIGKILL") for pid in node.pids()], [node.memory])
        await board.until(
            lambda: scene._back(generation) is not None, BACK_S, f"the job after {name} and {what}"
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
