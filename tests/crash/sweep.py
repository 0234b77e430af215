"""One job that is killed at one failpoint after another, on real processes, by way of the demo's cluster.

A trainer or a daemon dies by SIGKILL at a named place in the code; the job comes back, and
goes on to the next failpoint.  In the end every loss and the final state of every rank are
compared bit for bit with an uninterrupted control: one wrong or torn byte restored
anywhere on the way would show.  On the way, no recovery may go back behind a step that was known to
be protected when the process died.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
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
from ckptd.demo.strikes import Scene

_DIES_S = 30.0
_SETTLE_STEPS = 1
PAUSE = "pause"  # no failpoint: a daemon stands still for a step, and goes on
UPGRADE = "upgrade"  # no failpoint: a daemon is ended in order, and its successor started


class Sweep:
    """Runs a job through `names`; `done` says where processes died."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self.directory = directory
        self.names = list(names)
        self.done: list[str] = []
        self.resumed: list[tuple[str, int, int]] = []  # (failpoint, watermark known, resumed at)

    def run(self, monkeypatch: pytest.MonkeyPatch, seed: int, steps: int) -> DemoResult:
        """The demo with this sweep for a strike."""
        real = demo_cluster.base_environment

        def environment(places: Scratch) -> dict[str, str]:
            # What dies here dies of a blow: a daemon that is paused, or held up on a busy machine, is alive.
            return real(places) | {
                "CKPTD_FAILPOINTS": str(self.directory),
                "CKPTD_COORDINATOR_SILENCE_S": "30",
            }

        monkeypatch.setattr(demo_cluster, "base_environment", environment)
        monkeypatch.setattr(strikes, "STRIKES", {**strikes.STRIKES, "rank": self._strike})
        monkeypatch.setattr(story, "STRIKES", strikes.STRIKES)
        options = DemoOptions(kill="rank", nodes=2, parity=1, seed=seed, steps=steps, fork_server=True)
        return story.run(options)

    async def _strike(self, scene: Scene) -> None:
        for number, name in enumerate(self.names):
            await scene.step(scene.board.history.reached() + _SETTLE_STEPS)
            node = scene.cluster.node_of(number % 2)
            await (self._kill_trainer if name in failpoints.TRAINER else self._kill_daemon)(scene, node, name)
            self.done.append(name)

    async def _kill_trainer(self, scene: Scene, node: Node, name: str) -> None:
        (trainer,) = node.launcher.living()
        board, history, generation = scene.board, scene.board.history, scene.cluster.generation()
        board.calm = False
        self._arm(name, trainer.child.pid)
        async with asyncio.timeout(_DIES_S):
            await trainer.child.wait()
        assert not (self.directory / name).exists(), f"the trainer died elsewhere than at {name}"
        watermark = board.watermark or 0
        await board.until(
            lambda: scene._back(generation) is not None, strikes.BACK_S, f"the job after {name}"
        )
        board.calm = True
        resumed = history.resumed(max(history.generations()))
        assert resumed is not None and resumed >= watermark, (
            f"{name}: {resumed} after {watermark} was protected"
        )
        self.resumed.append((name, watermark, resumed))

    async def _kill_daemon(self, scene: Scene, node: Node, name: str) -> None:
        assert node.daemon is not None
        if name == PAUSE:
            node.daemon.send(signal.SIGSTOP)
            await scene.step(scene.board.history.reached() + 1)  # training does not wait for it
            node.daemon.send(signal.SIGCONT)
            await scene.protected_anew()
            return
        node.doomed = True
        if name == UPGRADE:
            await node.daemon.end(grace_s=_DIES_S)
        else:
            self._arm(name, node.daemon.pid)
            async with asyncio.timeout(_DIES_S):
                await node.daemon.wait()
        assert not (self.directory / name).exists(), f"the daemon died elsewhere than at {name}"
        watermark = scene.board.watermark or 0
        scene.cluster.start_daemon(node)
        node.doomed = False
        await serving(node.channel, f"the daemon of {node.name}", READY_S)
        await scene.protected_anew()
        assert (scene.board.watermark or 0) >= watermark

    def _arm(self, name: str, pid: int) -> None:
        scratch = self.directory / f".{name}"
        scratch.write_text(str(pid))
        scratch.replace(self.directory / name)
