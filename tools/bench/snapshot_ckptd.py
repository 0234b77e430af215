"""Starting the job of the snapshot benchmark: its two ranks, and for ckptd coordinator and daemons."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
from snapshot_figures import JOB

from ckptd.demo.channels import channel, serving
from ckptd.demo.children import Child, Children, tail
from ckptd.demo.cluster import address, python_path
from ckptd.demo.killer import MEMORY_PREFIX
from ckptd.demo.launcher import Launcher
from ckptd.memory import budget
from ckptd.v1 import common_pb2, coordinator_pb2, coordinator_pb2_grpc, daemon_pb2_grpc

NODES = RANKS = 2
PARITY = 1
_READY_S = 60.0
_CALL_S = 10.0
_SCRIPT = Path(__file__).with_name("snapshot_job.py")
# An image is a little more than its tensors: header, random states, padding.
_IMAGE_EXTRA_BYTES = 16 << 20


class JobFailed(Exception):
    """A rank did not end well; the text is the end of its log."""


@dataclass
class Places:
    """Where a benchmark puts things: all on tmpfs, gone with it."""

    root: Path
    children: Children

    def fresh(self, name: str) -> Path:
        """A new directory."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.root))


@asynccontextmanager
async def places() -> AsyncIterator[Places]:
    """The directory and the processes of this benchmark; both end with the body, or with this process."""
    with tempfile.TemporaryDirectory(
        prefix=f"{MEMORY_PREFIX}bench{os.getpid()}-", dir="/dev/shm", ignore_cleanup_errors=True
    ) as name:
        root = Path(name)
        async with Children(root, root) as children:
            children.guard_directory(root)
            yield Places(root, children)


def environment() -> dict[str, str]:
    """The user's, without ckptd's settings; the ranks decide about their threads."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CKPTD_")}
    kept.pop("OMP_NUM_THREADS", None)
    return kept | {"PYTHONPATH": python_path(), "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


async def run_plain(where: Places, arguments: list[str], timeout_s: float) -> None:
    """Runs both ranks to their end.

    Raises:
        JobFailed: a rank failed, or took too long.
    """
    host, port = address("127.0.0.1").rsplit(":", 1)
    common = environment() | {"MASTER_ADDR": host, "MASTER_PORT": port, "WORLD_SIZE": str(RANKS)}
    ranks = [_spawn_rank(where, rank, arguments, common) for rank in range(RANKS)]
    await _ended(ranks, timeout_s)


async def run_protected(
    where: Places, arguments: list[str], timeout_s: float, image_bytes: int, slots: int
) -> None:
    """Runs both ranks as a job of ckptd's, on two nodes with one parity; the launchers get orders.

    Args:
        image_bytes: of one rank, about.

    Raises:
        JobFailed: a rank failed, or took too long.
    """
    cluster = _Cluster(where, arguments, image_bytes + _IMAGE_EXTRA_BYTES, slots)
    try:
        async with asyncio.timeout(timeout_s):
            await cluster.start()
            while len(cluster.ranks) < RANKS:
                cluster.check_launchers()
                await asyncio.sleep(0.05)
        await _ended(cluster.ranks, timeout_s)
    except TimeoutError:
        raise JobFailed("the job was not started in time: " + tail(cluster.coordinator.log)) from None
    finally:
        await cluster.close()


@dataclass
class _Cluster:
    where: Places
    arguments: list[str]
    image_bytes: int
    slots: int
    ranks: list[Child] = field(default_factory=list)
    daemons: list[Child] = field(default_factory=list)
    channels: list[grpc.aio.Channel] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        """Returns when all serve and the job is submitted."""
        self.memory = self.where.fresh("memory")
        control = address("127.0.0.1")
        journal = str(self.memory / "journal.sqlite")
        self.coordinator = self._ckptd("coordinator", "--listen", control, "--journal", journal)
        coordinator = channel(control)
        self.channels.append(coordinator)
        launchers = [self._start_node(index, control) for index in range(NODES)]
        for connection in self.channels:
            await serving(connection, "a process of ckptd's", _READY_S)
        self.tasks = [asyncio.create_task(launcher.run()) for launcher in launchers]
        spec = coordinator_pb2.JobSpec(
            job=JOB, nodes=NODES, ranks_per_node=1, parity=PARITY, every=1, slots=self.slots
        )
        header = common_pb2.Header(job=JOB, timeout_ms=int(_CALL_S * 1e3))
        stub = coordinator_pb2_grpc.CoordinatorStub(coordinator)
        await stub.Submit(coordinator_pb2.SubmitRequest(header=header, spec=spec), timeout=_CALL_S)

    def check_launchers(self) -> None:
        """Raises what ended a launcher."""
        for task in self.tasks:
            if task.done():
                task.result()

    async def close(self) -> None:
        """Ends what was started."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*(child.end(grace_s=3.0) for child in [*self.ranks, *self.daemons]))
        for connection in self.channels:
            await connection.close()

    def _start_node(self, index: int, control: str) -> Launcher:
        name, host = f"node{index}", f"127.0.0.{index + 2}"
        memory = self.memory / name
        memory.mkdir(mode=0o700)
        listen = address(host)
        limit = budget.needed_bytes(self.image_bytes, 1, self.slots, NODES, PARITY)
        flags = {
            "node": name,
            "domain": name,
            "listen": listen,
            "bulk": address(host),
            "socket": str(self.memory / f"{name}.sock"),
            "memory-dir": str(memory),
            "memory-limit-bytes": str(limit),
            "coordinator": control,
        }
        self._ckptd("daemon", *(word for flag, value in flags.items() for word in (f"--{flag}", value)))
        connection = channel(listen)
        self.channels.append(connection)
        return Launcher(JOB, daemon_pb2_grpc.DaemonStub(connection), self._spawn)

    def _spawn(self, generation: int, rank: int, ordered: Mapping[str, str]) -> Child:
        if generation > 1:
            raise JobFailed("the job was restarted: " + tail(self.ranks[0].log))
        daemons = ",".join(str(child.pid) for child in self.daemons)
        env = {**environment(), **ordered, "BENCH_DAEMONS": daemons}
        child = _spawn_rank(self.where, rank, self.arguments, env)
        self.ranks.append(child)
        return child

    def _ckptd(self, *argv: str) -> Child:
        command = [sys.executable, "-m", "ckptd.cli.main", *argv]
        name = f"{argv[0]}{len(self.daemons)}"
        self.daemons.append(self.where.children.spawn(name, command, environment()))
        return self.daemons[-1]


def _spawn_rank(where: Places, rank: int, arguments: list[str], env: Mapping[str, str]) -> Child:
    command = [sys.executable, str(_SCRIPT), *arguments]
    return where.children.spawn(f"rank{rank}", command, {**env, "RANK": str(rank)})


async def _ended(ranks: list[Child], timeout_s: float) -> None:
    """Returns when all ranks ended well."""
    waits = {asyncio.create_task(child.wait()): child for child in ranks}
    try:
        async with asyncio.timeout(timeout_s):
            for done in asyncio.as_completed(waits):
                if await done != 0:
                    raise JobFailed(_logs(ranks))
    except TimeoutError:
        raise JobFailed(f"not finished after {timeout_s:.0f} s: {_logs(ranks)}") from None
    finally:
        for task in waits:
            task.cancel()
        await asyncio.gather(*(child.end(grace_s=0.0) for child in ranks))


def _logs(ranks: list[Child]) -> str:
    return "\n".join(f"{child.name} ends\n{tail(child.log, 12)}" for child in ranks)
