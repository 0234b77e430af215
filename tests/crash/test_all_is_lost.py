"""Every node dies with its memory, and the coordinator with its journal: the job goes on from storage.

Real coordinator, daemons and trainers; the second life has other nodes and another number of ranks.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import lost_worker
import torch

from ckptd.demo.channels import channel, serving
from ckptd.demo.children import Child, Children, tail
from ckptd.demo.cluster import address, python_path
from ckptd.demo.launcher import Launcher
from ckptd.storage import catalog
from ckptd.v1 import common_pb2, coordinator_pb2, coordinator_pb2_grpc, daemon_pb2_grpc

JOB = "lost"
READY_S = 60.0
DEADLINE_S = 60.0
FOREVER = 100_000


class Life:
    """One coordinator, and nodes with one rank each, from nothing but a store.

    Attributes:
        worker: the program of a rank; it gets the folder for what it tells, the steps, and a seed.
        settings: of all processes, more than the common ones.
    """

    worker: ClassVar[str] = lost_worker.__file__
    settings: ClassVar[Mapping[str, str]] = {}

    def __init__(self, name: str, nodes: int, store: Path, children: Children, root: Path) -> None:
        self.name, self.nodes, self.store, self.children = name, nodes, store, children
        self.root = root / name
        self.out = self.root / "out"
        self.out.mkdir(parents=True)
        self.processes: list[Child] = []
        self.channels: list[Any] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.memories: list[Path] = []

    async def start(self, steps: int, seed: int) -> None:
        self.control = address("127.0.0.1")
        self._ckptd("coordinator", "--listen", self.control, "--journal", str(self.root / "journal.sqlite"))
        coordinator = channel(self.control)
        self.channels.append(coordinator)
        await self.join(self.name, steps, seed)
        parity = min(1, self.nodes - 1)
        spec = coordinator_pb2.JobSpec(
            job=JOB, nodes=self.nodes, ranks_per_node=1, parity=parity, every=1, slots=3
        )
        header = common_pb2.Header(job=JOB, timeout_ms=10_000)
        stub = coordinator_pb2_grpc.CoordinatorStub(coordinator)
        await stub.Submit(coordinator_pb2.SubmitRequest(header=header, spec=spec), timeout=10.0)

    async def join(self, name: str, steps: int, seed: int) -> None:
        """As many nodes as the job has, with nothing in memory."""
        launchers = [self._node(f"{name}{index}", index, steps, seed) for index in range(self.nodes)]
        for connection in self.channels:
            await serving(connection, "a process of ckptd's", READY_S)
        self.tasks += [asyncio.create_task(launcher.run()) for launcher in launchers]

    async def lose_nodes(self) -> None:
        """All nodes at once, and nothing else."""
        coordinator, *others = self.processes
        await asyncio.gather(*(child.end(grace_s=0.0) for child in others))
        self.processes = [coordinator]
        for connection in self.channels[1:]:
            await connection.close()
        del self.channels[1:]
        for path in self.memories:
            shutil.rmtree(path)
        self.memories.clear()
        for path in self.out.iterdir():
            path.unlink()

    async def told(self) -> list[dict[str, Any]]:
        """What every rank says about its resume."""
        paths = [self.out / f"{rank}.json" for rank in range(self.nodes)]
        await self.until(lambda: all(path.exists() for path in paths), "every rank resumed")
        return [json.loads(path.read_text()) for path in paths]

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        end = asyncio.get_running_loop().time() + DEADLINE_S
        while not condition():
            if asyncio.get_running_loop().time() > end:
                logs = "\n".join(f"{child.name}\n{tail(child.log, 12)}" for child in self.processes)
                raise AssertionError(f"not within {DEADLINE_S:g} s: {what}\n{logs}")
            await asyncio.sleep(0.02)

    async def end(self) -> None:
        """All of it at once: processes, memory, journal."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.gather(*(child.end(grace_s=0.0) for child in self.processes))
        for connection in self.channels:
            await connection.close()
        shutil.rmtree(self.root)

    def _node(self, name: str, index: int, steps: int, seed: int) -> Launcher:
        host = f"127.0.0.{index + 2}"
        memory = self.root / name
        memory.mkdir(mode=0o700)
        self.memories.append(memory)
        listen = address(host)
        flags = {
            "node": name,
            "listen": listen,
            "bulk": address(host),
            "socket": str(self.root / f"{name}.sock"),
            "memory-dir": str(memory),
            "memory-limit-bytes": str(1 << 28),
            "coordinator": self.control,
        }
        self._ckptd("daemon", *(word for flag, value in flags.items() for word in (f"--{flag}", value)))
        connection = channel(listen)
        self.channels.append(connection)
        arguments = [self.worker, str(self.out), str(steps), str(seed)]

        def spawn(generation: int, rank: int, ordered: Mapping[str, str]) -> Child:
            env = self._environment() | {"GLOO_SOCKET_IFNAME": "lo", **ordered}
            child = self.children.spawn(f"{name}-rank{rank}-g{generation}", [sys.executable, *arguments], env)
            self.processes.append(child)
            return child

        return Launcher(JOB, daemon_pb2_grpc.DaemonStub(connection), spawn)

    def _ckptd(self, *argv: str) -> None:
        name = f"{self.name}-{argv[0]}{len(self.processes)}"
        command = [sys.executable, "-m", "ckptd.cli.main", *argv]
        self.processes.append(self.children.spawn(name, command, self._environment()))

    def _environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("CKPTD_")}
        mine = {"CKPTD_STORE": str(self.store), "CKPTD_FLUSH_EVERY": "2", "PYTHONPATH": python_path()}
        mine["CKPTD_COORDINATOR_STORAGE_AFTER_S"] = "1"
        mine["CKPTD_COORDINATOR_SILENCE_S"] = "30"  # nodes are lost by a blow, and not by a busy machine
        return kept | mine | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | dict(self.settings)


@asynccontextmanager
async def places(tmp_path: Path) -> AsyncIterator[tuple[Children, Path]]:
    with tempfile.TemporaryDirectory(prefix="ckptd-test-lost-", dir="/dev/shm") as memory:
        async with Children(tmp_path, tmp_path) as children:
            yield children, Path(memory)


def digest_after(steps: int) -> str:
    """What an uninterrupted run has; every rank of every life trains the same."""
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, optimizer = lost_worker.build()
    for step in range(steps):
        lost_worker.train_step(model, optimizer, step)
    torch.set_num_threads(threads)
    return lost_worker.digest(model, optimizer)


async def two_lives(tmp_path: Path) -> None:
    store = tmp_path / "store"
    async with places(tmp_path) as (children, memory):
        first = Life("first", 2, store, children, memory)
        await first.start(FOREVER, seed=3)
        assert [told["rung"] for told in await first.told()] == ["none", "none"]
        await first.until(lambda: len(catalog.entries(str(store), JOB)) >= 2, "two durable steps")
        await first.end()

        durable = catalog.entries(str(store), JOB)[-1]
        second = Life("second", 3, store, children, memory)
        await second.start(FOREVER, seed=77)
        for told in await second.told():
            assert (told["step"], told["rung"]) == (durable.step, "storage")
            assert told["layout_change"] == "2 ranks, now 3"
            assert told["generation"] > durable.generation, "a generation is never used again"
            assert told["digest"] == digest_after(durable.step), f"step {durable.step} is another one"
        await second.until(
            lambda: catalog.entries(str(store), JOB)[-1].step > durable.step,
            "a durable step of the second life",
        )
        await second.end()
        newest = catalog.entries(str(store), JOB)[-1]
        print(f"1 job killed entirely, durable at step {durable.step}, again at {newest.step}")


async def other_nodes(tmp_path: Path) -> None:
    store = tmp_path / "store"
    async with places(tmp_path) as (children, memory):
        life = Life("life", 2, store, children, memory)
        await life.start(FOREVER, seed=3)
        await life.told()
        await life.until(lambda: catalog.entries(str(store), JOB), "a durable step")
        await life.lose_nodes()
        durable = catalog.entries(str(store), JOB)[-1]
        await life.join("other", FOREVER, seed=77)
        for told in await life.told():
            assert (told["step"], told["rung"], told["layout_change"]) == (durable.step, "storage", None)
            assert told["generation"] > durable.generation
            assert told["digest"] == digest_after(durable.step)
        await life.until(
            lambda: catalog.entries(str(store), JOB)[-1].step > durable.step,
            "a durable step on the other nodes",
        )
        await life.end()


def test_when_all_nodes_are_lost_the_coordinator_takes_the_job_to_others_from_storage(tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(other_nodes(tmp_path), 110))


def test_a_job_killed_entirely_goes_on_from_storage_with_other_nodes_and_ranks(tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(two_lives(tmp_path), 110))
