"""What each `--kill` does, from the first wait to the last."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptd.demo.blows import Draw, Killer, draw
from ckptd.demo.board import Board
from ckptd.demo.channels import serving
from ckptd.demo.cluster import READY_S, Cluster, Node
from ckptd.demo.options import WARMUP_STEPS, ResolvedOptions

# The first step takes the interpreters' start on a busy machine.
STEP_S = 90.0
BACK_S = 90.0
GONE_S = 30.0
SETTLE_STEPS = 2


@dataclass(frozen=True)
class Struck:
    """A strike that the job has to come back from."""

    at_s: float
    generation: int


@dataclass(frozen=True)
class Scene:
    """Everything that a strike needs."""

    options: ResolvedOptions
    board: Board
    cluster: Cluster
    killer: Killer

    async def step(self, step: int) -> None:
        """Returns when every rank has completed `step`."""
        await self.board.until(lambda: self.board.history.reached() >= step, STEP_S, f"step {step}")

    async def protected_anew(self) -> None:
        """Returns when a step is protected that was not even done at the call."""
        done = self.board.history.reached()
        board = self.board
        await board.until(lambda: (board.watermark or 0) > done, BACK_S, f"a protected step after {done}")
        board.tell("protected-anew", f"protection is back: step {board.watermark} is protected")

    async def drawn(
        self, name: str, victims: int = 1, after_step: int = WARMUP_STEPS
    ) -> tuple[Draw, list[Node]]:
        """This seed's choice and the nodes of its ranks, once `after_step` is completed."""
        await self.step(after_step)
        choice = draw(f"{self.options.kill}/{name}", self.options.seed, self.options.nodes, victims)
        return choice, [self.cluster.node_of(rank) for rank in choice.ranks]

    async def strike(
        self,
        choice: Draw,
        signals: Sequence[tuple[int, str]],
        text: str,
        harm: Mapping[str, str],
        remove: Sequence[Path] = (),
    ) -> Struck:
        """Strikes at the drawn time, and returns when the job has taken its first step again."""
        board, generation = self.board, self.cluster.generation()
        board.calm = False
        delay_s = choice.delay_s(board.history.step_s() or 0.0)
        struck_s = await self.killer.strike(signals, remove, delay_s)
        for name, how in harm.items():
            board.nodes[name].harm = how
        board.tell("strike", text, struck_s)
        await board.until(
            lambda: self._back(generation) is not None, BACK_S, "the job's first step after the strike"
        )
        board.calm = True
        back_s, step = self._back(generation) or 0.0, board.history.reached()
        board.tell("back", f"the job is back: every rank has completed step {step}", back_s)
        return Struck(struck_s, generation)

    def _back(self, generation: int) -> float | None:
        """When a newer generation had completed its first step."""
        history = self.board.history
        times = [history.first_step_s(g) for g in history.generations() if g > generation]
        return min((time_s for time_s in times if time_s is not None), default=None)


async def none(scene: Scene) -> None:
    """Nothing is killed: the job must run through without an incident."""


async def rank(scene: Scene) -> Struck:
    """SIGKILL to one trainer; its node's daemon and memory stay."""
    choice, (node,) = await scene.drawn("rank")
    (trainer,) = node.launcher.living()
    return await scene.strike(
        choice,
        [(trainer.child.pid, "SIGKILL")],
        f"SIGKILL to the trainer of rank {trainer.rank} on {node.name}",
        {node.name: "trainer killed"},
    )


async def node(scene: Scene, name: str = "node", victims: int = 1, after_step: int = WARMUP_STEPS) -> Struck:
    """SIGKILL to trainer and daemon of `victims` nodes at one moment, and removal of their memory."""
    choice, nodes = await scene.drawn(name, victims, after_step)
    for victim in nodes:
        victim.doomed = True
    return await scene.strike(
        choice,
        [(pid, "SIGKILL") for victim in nodes for pid in victim.pids()],
        f"SIGKILL to trainer and daemon of {' and '.join(_described(nodes, choice))}, memory removed",
        {victim.name: "killed, memory removed" for victim in nodes},
        [victim.memory for victim in nodes],
    )


async def two_nodes(scene: Scene) -> Struck:
    """As `node`, for two nodes at the same moment."""
    return await node(scene, "two-nodes", victims=2)


async def node_silent(scene: Scene) -> Struck:
    """SIGSTOP to all processes of one node; continued when the job runs again, they must change nothing."""
    board = scene.board
    choice, nodes = await scene.drawn("node-silent")
    (victim,) = nodes
    stale, pids = victim.launcher.living(), victim.pids()
    text = f"SIGSTOP to trainer and daemon of {_described(nodes, choice)[0]}: no connection closes"
    struck = await scene.strike(choice, [(pid, "SIGSTOP") for pid in pids], text, {victim.name: "stopped"})
    await scene.step(board.history.reached() + SETTLE_STEPS)
    continued_s = await scene.killer.strike([(pid, "SIGCONT") for pid in pids])
    board.nodes[victim.name].harm = "continued"
    board.tell("continued", f"SIGCONT to {victim.name}: its processes go on with what they know", continued_s)
    await board.until(
        lambda: not any(trainer.child.alive for trainer in stale),
        GONE_S,
        f"the old trainer of {victim.name} to end",
    )
    board.tell("stale-ended", f"the old trainer of {victim.name} has ended, and changed nothing")
    return struck


async def daemon(scene: Scene) -> Struck:
    """SIGKILL to a daemon, which is restarted; after a newly protected step a node is killed."""
    board = scene.board
    choice, (victim,) = await scene.drawn("daemon")
    assert victim.daemon is not None
    victim.doomed = True
    delay_s = choice.delay_s(board.history.step_s() or 0.0)
    struck_s = await scene.killer.strike([(victim.daemon.pid, "SIGKILL")], delay_s=delay_s)
    board.tell("daemon-killed", f"SIGKILL to the daemon of {victim.name}: training must go on", struck_s)
    await victim.daemon.wait()
    scene.cluster.start_daemon(victim)
    victim.doomed = False
    await serving(victim.channel, f"the daemon of {victim.name}", READY_S)
    board.tell("daemon-restarted", f"the daemon of {victim.name} is back and adopts its memory")
    await scene.protected_anew()
    return await node(scene, after_step=board.history.reached() + 1)


async def coordinator(scene: Scene) -> Struck:
    """SIGKILL to the coordinator, which is restarted; after a newly protected step a node is killed."""
    board, cluster = scene.board, scene.cluster
    choice, _ = await scene.drawn("coordinator")
    assert cluster.coordinator is not None
    cluster.coordinator_doomed = True
    delay_s = choice.delay_s(board.history.step_s() or 0.0)
    struck_s = await scene.killer.strike([(cluster.coordinator.pid, "SIGKILL")], delay_s=delay_s)
    board.tell("coordinator-killed", "SIGKILL to the coordinator: training must go on", struck_s)
    await cluster.coordinator.wait()
    cluster.start_coordinator()
    cluster.coordinator_doomed = False
    await serving(cluster.coordinator_channel, "the coordinator", READY_S)
    board.tell("coordinator-restarted", "the coordinator is back with its journal")
    await scene.protected_anew()
    return await node(scene, after_step=board.history.reached() + 1)


def _described(nodes: Sequence[Node], choice: Draw) -> list[str]:
    return [f"{node.name} (rank {rank})" for node, rank in zip(nodes, choice.ranks, strict=True)]


STRIKES: Mapping[str, Callable[[Scene], Awaitable[Struck | None]]] = {
    "none": none,
    "rank": rank,
    "node": node,
    "node-silent": node_silent,
    "two-nodes": two_nodes,
    "daemon": daemon,
    "coordinator": coordinator,
}
