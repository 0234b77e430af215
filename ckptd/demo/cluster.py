"""The demo's cluster: one coordinator and a daemon per node, as separate processes.

Every node has a loopback address, a memory directory and a socket of its own.  Losing a
node means losing its processes and that directory, and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from ckptd.demo import example
from ckptd.demo.board import Board
from ckptd.demo.channels import channel, serving
from ckptd.demo.children import Child, Children, RecordPipe
from ckptd.demo.launcher import Launcher
from ckptd.demo.options import DemoFailed, ResolvedOptions
from ckptd.demo.scratch import SLOTS, Scratch, memory_limit_bytes
from ckptd.v1 import common_pb2, coordinator_pb2, coordinator_pb2_grpc, daemon_pb2_grpc

JOB = "gpt-demo"
READY_S = 60.0
SUBMIT_S = 10.0


@dataclass
class Node:
    """One node: addresses, places, processes."""

    name: str
    control: str
    bulk: str
    memory: Path
    socket: Path
    channel: grpc.aio.Channel
    launcher: Launcher
    daemon: Child | None = None
    # What may end without being a failure of the demo.
    doomed: bool = False
    task: asyncio.Task[None] | None = field(default=None)

    def pids(self) -> list[int]:
        """All living processes of this node: trainers, then the daemon."""
        found = [trainer.child.pid for trainer in self.launcher.living()]
        if self.daemon is not None and self.daemon.alive:
            found.append(self.daemon.pid)
        return found


class Cluster:
    """Starts the processes, keeps them, and restarts those that the demo says it may."""

    def __init__(
        self,
        options: ResolvedOptions,
        places: Scratch,
        children: Children,
        board: Board,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.options = options
        self._places = places
        self._children = children
        self._board = board
        self._tasks = tasks
        self._address = address("127.0.0.1")
        self.coordinator: Child | None = None
        self.coordinator_doomed = False
        self.coordinator_channel = channel(self._address)
        self.nodes = {name: self._node(index, name) for index, name in enumerate(board.nodes)}

    async def start(self) -> None:
        """Returns when the coordinator and all daemons serve, and the job is submitted."""
        self.start_coordinator()
        for node in self.nodes.values():
            self.start_daemon(node)
        await asyncio.gather(
            serving(self.coordinator_channel, "the coordinator", READY_S),
            *(serving(node.channel, f"the daemon of {node.name}", READY_S) for node in self.nodes.values()),
        )
        for node in self.nodes.values():
            node.task = self._tasks.create_task(node.launcher.run())
        await self._submit()

    def start_coordinator(self) -> None:
        """Starts the coordinator on its address and journal; once more, it finds both again."""
        journal = self._places.root / "journal.sqlite"
        argv = ["coordinator", "--listen", self._address, "--journal", str(journal)]
        self.coordinator = self._ckptd("coordinator", argv)
        self._tasks.create_task(self._watch_coordinator(self.coordinator))

    def start_daemon(self, node: Node) -> None:
        """Starts a node's daemon on its addresses and memory; once more, it adopts what is there."""
        node.memory.mkdir(mode=0o700, exist_ok=True)
        flags = {
            "node": node.name,
            "domain": node.name,
            "listen": node.control,
            "bulk": node.bulk,
            "socket": str(node.socket),
            "memory-dir": str(node.memory),
            "memory-limit-bytes": str(memory_limit_bytes(self.options)),
            "coordinator": self._address,
        }
        argv = ["daemon", *(word for flag, value in flags.items() for word in (f"--{flag}", value))]
        node.daemon = self._ckptd(node.name, argv)
        self._tasks.create_task(self._watch_daemon(node, node.daemon))

    def generation(self) -> int:
        """The newest generation of which a trainer was started; 0 before."""
        return max((t.generation for node in self.nodes.values() for t in node.launcher.trainers), default=0)

    def node_of(self, rank: int) -> Node:
        """The node on which the newest generation's trainer of `rank` was started."""
        generation = self.generation()
        (found,) = (
            node
            for node in self.nodes.values()
            if any((t.generation, t.rank) == (generation, rank) for t in node.launcher.trainers)
        )
        return found

    async def trainers_ended(self) -> None:
        """Returns when the newest generation's trainers are gone; `_watch_trainer` judges how they ended."""
        generation = self.generation()
        trainers = [
            t for node in self.nodes.values() for t in node.launcher.trainers if t.generation == generation
        ]
        await asyncio.gather(*(trainer.child.wait() for trainer in trainers))

    async def close(self) -> None:
        """Lets everything end in order, as an operator would: the trainers are done."""
        self.coordinator_doomed = True
        for node in self.nodes.values():
            node.doomed = True
            if node.task is not None:
                node.task.cancel()
        processes = [node.daemon for node in self.nodes.values()] + [self.coordinator]
        await asyncio.gather(*(child.end(grace_s=5.0) for child in processes if child is not None))
        for node in self.nodes.values():
            await node.channel.close()
        await self.coordinator_channel.close()

    async def _submit(self) -> None:
        spec = coordinator_pb2.JobSpec(
            job=JOB,
            nodes=self.options.nodes,
            ranks_per_node=1,
            parity=self.options.parity,
            every=1,
            slots=SLOTS,
        )
        header = common_pb2.Header(job=JOB, timeout_ms=int(SUBMIT_S * 1e3))
        stub = coordinator_pb2_grpc.CoordinatorStub(self.coordinator_channel)
        await stub.Submit(coordinator_pb2.SubmitRequest(header=header, spec=spec), timeout=SUBMIT_S)

    def _node(self, index: int, name: str) -> Node:
        host = f"127.0.0.{index + 2}"
        control = address(host)
        connection = channel(control)
        return Node(
            name=name,
            control=control,
            bulk=address(host),
            memory=self._places.memory / name,
            socket=self._places.memory / f"{name}.sock",
            channel=connection,
            launcher=Launcher(
                JOB,
                daemon_pb2_grpc.DaemonStub(connection),
                lambda generation, rank, env: self._spawn_trainer(name, generation, rank, env),
            ),
        )

    def _spawn_trainer(self, node: str, generation: int, rank: int, env: Mapping[str, str]) -> Child:
        pipe = RecordPipe(lambda record: self._board.record(generation, record))
        child = self._children.spawn_trainer(
            f"{node}-rank{rank}-g{generation}",
            trainer_argv("train.py", self.options, pipe.path),
            {**trainer_environment(self._places), "PYTHONPATH": python_path(), **env},
            [pipe.write_end],
        )
        pipe.handed_over()
        self._tasks.create_task(self._watch_trainer(child, generation))
        return child

    def _ckptd(self, name: str, argv: list[str]) -> Child:
        environment = base_environment(self._places) | {"PYTHONPATH": python_path()}
        return self._children.spawn(name, [sys.executable, "-m", "ckptd.cli.main", *argv], environment)

    async def _watch_trainer(self, trainer: Child, generation: int) -> None:
        status = await trainer.wait()
        self._board.changed()
        # After a strike its peers fail, too; they are stopped, and older ones end when they wake up.
        if status != 0 and self._board.calm and generation == self.generation():
            raise DemoFailed.of(f"{trainer.name} ended with {status}", "nothing was killed", trainer.log)

    async def _watch_daemon(self, node: Node, daemon: Child) -> None:
        status = await daemon.wait()
        if not node.doomed:
            raise DemoFailed.of(
                f"the daemon of {node.name} ended with {status}", "nobody killed it", daemon.log
            )

    async def _watch_coordinator(self, coordinator: Child) -> None:
        status = await coordinator.wait()
        if not self.coordinator_doomed:
            raise DemoFailed.of(f"the coordinator ended with {status}", "nobody killed it", coordinator.log)


def address(host: str) -> str:
    """host:port with a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def python_path() -> str:
    """PYTHONPATH for processes that import ckptd: this very package, wherever they run."""
    return os.pathsep.join(filter(None, [str(example.PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))


def base_environment(places: Scratch) -> dict[str, str]:
    """The user's environment without ckptd's own settings, kept away from the user's directories."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CKPTD_")}
    return kept | {"TMPDIR": str(places.root)}


def trainer_environment(places: Scratch) -> dict[str, str]:
    """What every trainer gets, the control's included: the same arithmetic on every machine's CPU."""
    return base_environment(places) | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }


def trainer_argv(script: str, options: ResolvedOptions, log: str) -> list[str]:
    """The command of train.py or control.py."""
    path = str(example.directory() / script)
    return [sys.executable, path, "--steps", str(options.steps), "--seed", str(options.seed), "--log", log]
