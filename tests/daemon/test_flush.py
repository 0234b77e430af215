"""Flushes of several nodes, when one of them does not bring its part: real nodes, real store, real service.

The nodes make their schedule as they do while their coordinator is away, so that it follows from their facts.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import accumulate, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster import JOB, PLAN, Cluster, until
from daemonkit import looped

from ckptd.daemon import flush_others
from ckptd.daemon.authority import Authority
from ckptd.daemon.frames import FrameLink
from ckptd.daemon.node import Node
from ckptd.daemon.service import DaemonService
from ckptd.daemon.settings import DaemonSettings
from ckptd.image import ImagePlan, TensorSpec, Variable, encode
from ckptd.image.variable import write_variable
from ckptd.memory.bulk import BulkServer
from ckptd.memory.pace import Pace
from ckptd.rpc import make_server
from ckptd.storage import catalog
from ckptd.storage.local_store import LocalStore
from ckptd.v1 import common_pb2, daemon_pb2_grpc, local_pb2

SLICE = 4 << 20  # of a paced write
NEVER_S = 600.0  # the settings' own default, which no test waits for


class Flushing(Cluster):
    """Nodes with a control service each and one store, of which every step is to become durable."""

    def __init__(self, root: Path, count: int, image_bytes: int = 20_000, **settings: Any) -> None:
        self.layout = ImagePlan.build([TensorSpec("own", "F32", (image_bytes // 4,))], objects_capacity=4096)
        self.store = root / "store"
        self.settings = {"flush_every": 1, "flush_timeout_s": NEVER_S, **settings}
        self.authority = Authority()
        self.names: list[str] = []
        self.asking: list[Asking] = []
        self.services: dict[str, tuple[Any, Counting]] = {}
        self.runs: dict[str, asyncio.Task[None]] = {}
        # A node that is started again has the addresses that it had before.
        self.addresses: dict[str, str] = {}
        self.bulk_addresses: dict[str, str] = {}
        super().__init__(root, count, parity=1)

    def add(self, name: str) -> Node:
        directory = self.root / name
        directory.mkdir(parents=True, exist_ok=True)
        settings = DaemonSettings(
            node=name,
            memory_dir=directory,
            coordinator="127.0.0.1:1",
            bulk_timeout_s=5.0,
            bulk_nice=0,
            store=str(self.store),
            **self.settings,
        )
        node = Node(settings, self.pool)
        listen = self.bulk_addresses.get(name, "127.0.0.1:0")
        server = BulkServer(listen, node.protection.handle, 5.0, 0)
        self.bulk_addresses[name] = node.bulk_address = server.address
        self.nodes[name], self.servers[name] = node, server
        return node

    async def serve(self, name: str) -> None:
        """Starts the control service of a node."""
        service = Counting(self.nodes[name])

        def register(server: Any) -> None:
            daemon_pb2_grpc.add_DaemonServicer_to_server(service, server)

        listen = self.addresses.get(name, "127.0.0.1:0")
        server, port = await make_server("ckptd.v1.Daemon", register, listen)
        await server.start()
        self.services[name] = server, service
        self.addresses[name] = self.nodes[name].control_address = f"127.0.0.1:{port}"

    def run(self, name: str) -> None:
        """The node's background flushes begin."""
        self.runs[name] = asyncio.create_task(self.nodes[name].flush.run())

    def asked(self, name: str) -> int:
        """How often this node was asked for its status."""
        return self.services[name][1].asked

    def roster(self, names: list[str], generation: int, start: tuple[int, int] = (0, 0)) -> common_pb2.Roster:
        roster = super().roster(names, generation, start)
        for member in roster.members:
            member.control_address = self.nodes[member.node].control_address
        return roster

    async def lose(self, name: str) -> None:
        """The node's daemon is killed; its memory stays where it is."""
        await self.services.pop(name)[0].stop(None)
        if name in self.runs:
            self.runs.pop(name).cancel()
        self.kill(name)

    async def restart(self, name: str) -> None:
        """The node's daemon is killed and started again; its trainers come back to it."""
        step = self.job(name).living()[0].step
        await self.lose(name)
        self.add(name).adopt()
        await self.serve(name)
        self.plan(name, self.layout.image_bytes)
        for trainer in self.job(name).living():
            trainer.step = step
        self.run(name)

    async def begin(self, names: list[str], generation: int, start: tuple[int, int] = (0, 0)) -> None:
        self.names = names
        self.direct(names, self.roster(names, generation, start))
        for name in names:
            self.plan(name, self.layout.image_bytes)

    def tick(self) -> None:
        """One round of facts and schedules; whoever may begin a background flush does."""
        for name in self.names:
            self.authority.note(name, self.job(name).report())
        schedule = self.authority.schedule(self.job(self.names[0]))
        for name in self.names:
            job, copy = self.job(name), common_pb2.Schedule()
            copy.CopyFrom(schedule)
            job.apply(copy)

    def train(self, name: str, step: int) -> None:
        """All ranks of a node complete `step`, and capture it where that is due."""
        job = self.job(name)
        for trainer in job.living():
            place = job.grants.get(trainer.rank, {}).get(step)
            if place is not None:
                self.write(place.image, job.generation, step, trainer.rank)
                captured = local_pb2.Captured(step=step, slot=place.slot, plan_hash=PLAN)
                self.nodes[name].protection.captured(job, job.captured(trainer, captured), trainer.rank)
            trainer.step = step

    async def protect(self, step: int) -> None:
        """Everybody trains to `step`; returns when it is protected."""
        self.tick()
        for name in self.names:
            self.train(name, step)

        def protected() -> bool:
            self.tick()
            return all(self.job(name).schedule.watermark >= step for name in self.names)

        await until(protected, f"step {step} protected")

    async def until_durable(self, first: int, after: int) -> int:
        """Trains from `first` on until a step newer than `after` is durable; returns the last one trained."""
        step = first
        while not any(entry.step > after for entry in self.durable()):
            assert step < first + 200, "no newer step became durable"
            await self.protect(step)
            await asyncio.sleep(0.02)
            step += 1
        return step - 1

    def write(self, image: memoryview, generation: int, step: int, rank: int) -> None:
        """The image of a rank, which holds what no other one does."""
        layout, world = self.layout, len(self.names)
        image[: len(layout.header)] = layout.header
        array = np.random.default_rng([step, rank]).random(layout.tensors[0].shape).astype(np.float32)
        layout.tensor(image, "own")[:] = memoryview(array).cast("B")
        write_variable(layout, image, Variable(JOB, generation, step, rank, world, encode({"rank": rank})))

    def durable(self) -> list[catalog.Entry]:
        return catalog.entries(str(self.store), JOB)


class Counting(DaemonService):
    """The service, which counts how often it is asked."""

    asked = 0

    async def Status(self, request: Any, context: Any) -> Any:
        self.asked += 1
        return await super().Status(request, context)


class Asking:
    """A rank's trainer, as `save(wait="durable")` has it: asks, and reads the answer from its socket."""

    def __init__(self, cluster: Flushing, name: str, step: int) -> None:
        job = cluster.job(name)
        (trainer,) = job.living()
        ours, self._sock = socket.socketpair()
        self._sock.setblocking(False)
        self._link = trainer.link = FrameLink(ours)
        cluster.asking.append(self)
        cluster.nodes[name].flush.request(job, trainer, step)

    async def answer(self) -> local_pb2.Flushed:
        """The answer; grants that come before it are of no interest here."""
        async with asyncio.timeout(20):
            while True:
                (length,) = struct.unpack("<I", await self._exactly(4))
                message = local_pb2.DaemonMessage.FromString(await self._exactly(length))
                if message.WhichOneof("body") == "flushed":
                    return message.flushed

    async def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = await asyncio.get_running_loop().sock_recv(self._sock, count - len(data))
            assert part, "the daemon ended the connection"
            data += part
        return data

    def close(self) -> None:
        self._link.close()
        self._sock.close()


def hold(node: Node, slow: threading.Event, go: threading.Event) -> None:
    """After the first slice, what the node writes waits for `go`; `slow` says that it does."""

    def wait(seconds: float) -> None:
        slow.set()
        assert go.wait(20)

    node.flush._pace = Pace(1, clock=lambda: 0.0, sleep=wait)


@asynccontextmanager
async def flushing(root: Path, count: int, idle: str = "", **options: Any) -> AsyncIterator[Flushing]:
    """A job on nodes n0, n1, ... in generation 1; the one that is `idle` has not begun to flush."""
    cluster = Flushing(root, count, **options)
    try:
        names = list(cluster.nodes)
        for name in names:
            await cluster.serve(name)
            if name != idle:
                cluster.run(name)
        await cluster.begin(names, 1)
        yield cluster
    finally:
        for task in cluster.runs.values():
            task.cancel()
        await asyncio.gather(*cluster.runs.values(), return_exceptions=True)
        for asking in cluster.asking:
            asking.close()
        for server, _ in cluster.services.values():
            await server.stop(None)
        cluster.close()


@looped
async def test_what_a_node_cannot_write_holds_up_no_later_step(tmp_path: Path) -> None:
    async with flushing(tmp_path, 3) as cluster:
        (tmp_path / "file").touch()
        n2 = cluster.nodes["n2"].settings
        n2.store = str(tmp_path / "file" / "store")  # nothing can be written there
        await cluster.protect(1)
        assert cluster.job("n0").schedule.flush == 1
        await until(lambda: cluster.job("n2").flush_over == 1, "n2 gave up")
        n2.store = str(cluster.store)
        await cluster.until_durable(2, after=1)
        assert 1 not in {entry.step for entry in cluster.durable()}


@pytest.mark.parametrize("lost", ["n0", "n2"])
@looped
async def test_a_daemon_that_comes_back_without_the_step_holds_up_no_later_one(
    tmp_path: Path, lost: str
) -> None:
    """The one that leads, and another one."""
    async with flushing(tmp_path, 3, idle=lost) as cluster:
        for step in (1, 2, 3):
            await cluster.protect(step)
        assert cluster.job("n1").schedule.flush == 1
        await cluster.restart(lost)
        assert (1, 1) not in cluster.job(lost).memory.holdings
        await cluster.until_durable(4, after=1)
        assert 1 not in {entry.step for entry in cluster.durable()}


@looped
async def test_a_daemon_that_comes_back_with_the_step_makes_it_durable(tmp_path: Path) -> None:
    async with flushing(tmp_path, 3, idle="n2") as cluster:
        await cluster.protect(1)
        await until(lambda: cluster.asked("n2") > 0, "n0 waits for n2")
        await cluster.restart("n2")
        await cluster.protect(1)  # no step is trained, and none is lost
        await until(lambda: bool(cluster.durable()), "step 1 durable")
        assert [entry.step for entry in cluster.durable()] == [1]


@looped
async def test_a_lost_node_costs_one_flush_and_those_who_ask_hear_it_at_once(tmp_path: Path) -> None:
    async with flushing(tmp_path, 4, idle="n2") as cluster:
        await cluster.begin(["n0", "n1", "n2"], 2)
        await cluster.protect(1)
        asking = [Asking(cluster, name, 1) for name in ("n0", "n1")]
        await cluster.lose("n2")
        await cluster.begin(["n0", "n1", "n3"], 3)
        for each in asking:
            error = (await each.answer()).error
            assert error.code == common_pb2.ERROR_CODE_NOT_FOUND
            assert "generation 3" in error.what
        await cluster.until_durable(1, after=0)
        assert {entry.generation for entry in cluster.durable()} == {3}
        for name in cluster.names:
            assert {generation for _, generation, _ in cluster.nodes[name].flush._tasks} <= {3}


@looped
async def test_a_write_that_nobody_needs_any_more_ends(tmp_path: Path) -> None:
    """A slow one keeps the next generation's from the only thread no longer than one slice takes."""
    async with flushing(tmp_path, 2, image_bytes=3 * SLICE) as cluster:
        slow, go = threading.Event(), threading.Event()
        hold(cluster.nodes["n0"], slow, go)
        await cluster.protect(1)
        await until(slow.is_set, "n0 writes")
        await cluster.begin(["n0", "n1"], 2)
        cluster.nodes["n0"].flush._pace = Pace(0)
        go.set()
        await cluster.until_durable(1, after=0)
        assert not (cluster.store / JOB / "step-00000001.g00001" / "rank-00000.safetensors").exists()


@looped
async def test_a_newer_step_that_fails_ends_no_write_of_an_older_one(tmp_path: Path) -> None:
    async with flushing(tmp_path, 2, flush_every=0, image_bytes=3 * SLICE) as cluster:
        slow, go = threading.Event(), threading.Event()
        hold(cluster.nodes["n1"], slow, go)
        await cluster.protect(1)
        waiting = [Asking(cluster, name, 1) for name in cluster.names]
        await until(slow.is_set, "n1 writes")
        job = cluster.job("n1")
        cluster.nodes["n1"].flush.request(job, *job.living(), 2)
        job.abort(2)
        failed = await waiting[1].answer()
        assert failed.step == 2 and "given up" in failed.error.what
        assert job.flush_over == 0, "the flush of step 1 is under way"
        asked = cluster.asked("n1")
        await until(lambda: cluster.asked("n1") > asked + 1, "n0 asks n1 what became of it")
        go.set()
        for each in waiting:
            assert (await each.answer()).url
        assert [entry.step for entry in cluster.durable()] == [1]


@looped
async def test_what_only_trainers_asked_for_ends_when_a_daemon_forgot_it(tmp_path: Path) -> None:
    async with flushing(tmp_path, 3, flush_every=0) as cluster:
        await cluster.protect(1)
        asking = {name: Asking(cluster, name, 1) for name in ("n0", "n1")}
        await until(lambda: cluster.asked("n2") > 0, "n0 waits for n2")
        await cluster.restart("n2")
        errors = {name: (await each.answer()).error for name, each in asking.items()}
        assert {error.code for error in errors.values()} == {common_pb2.ERROR_CODE_NOT_FOUND}
        assert "node n2 does not bring its part" in errors["n0"].why
        assert "node n0 does not bring its part" in errors["n1"].why


@looped
async def test_a_node_that_has_brought_its_part_may_go(tmp_path: Path) -> None:
    async with flushing(tmp_path, 3, flush_every=0, image_bytes=3 * SLICE) as cluster:
        slow, go = threading.Event(), threading.Event()
        hold(cluster.nodes["n1"], slow, go)
        await cluster.protect(1)
        first, _, _ = (Asking(cluster, name, 1) for name in cluster.names)
        part = cluster.store / JOB / "step-00000001.g00001" / "rank-00002.safetensors.part"
        await until(lambda: slow.is_set() and part.exists(), "n1 writes, n2 has written")
        before = cluster.asked("n2")
        await until(lambda: cluster.asked("n2") > before, "n0 waits for n1")
        await cluster.restart("n2")
        await until(lambda: cluster.asked("n2") >= 2, "n0 has seen that n2 forgot all")
        go.set()
        assert (await first.answer()).url


@looped
async def test_a_slow_node_is_waited_for(tmp_path: Path) -> None:
    """It has said nothing yet, and has not failed."""
    async with flushing(tmp_path, 3, flush_every=0) as cluster:
        await cluster.protect(1)
        asking = [Asking(cluster, name, 1) for name in ("n0", "n1")]
        await until(lambda: cluster.asked("n2") >= 2, "n0 has asked n2 twice")
        asking.append(Asking(cluster, "n2", 1))
        urls = {(await each.answer()).url for each in asking}
        assert urls == {str(cluster.store / JOB / "step-00000001.g00001")}


@looped
async def test_who_asks_for_a_step_that_is_durable_waits_for_nobody(tmp_path: Path) -> None:
    async with flushing(tmp_path, 2) as cluster:
        await cluster.protect(1)
        await until(lambda: all(cluster.job(name).flush_over == 1 for name in cluster.names), "durable")
        for name in cluster.names:
            assert (await Asking(cluster, name, 1).answer()).url
        left = cluster.store / JOB / "step-00000001.g00001"
        assert not list(left.glob("*.offer")) and not list(left.glob("*.part"))


@looped
async def test_a_long_wait_asks_the_store_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()
    for call in ("list", "open"):
        known = getattr(LocalStore, call)

        def counted(store: LocalStore, *args: Any, call: str = call, known: Any = known) -> Any:
            counts[call] += store.url.endswith("step-00000001.g00001")
            return known(store, *args)

        monkeypatch.setattr(LocalStore, call, counted)
    async with flushing(tmp_path, 2, flush_every=0) as cluster:
        await cluster.protect(1)
        asking = Asking(cluster, "n0", 1)
        await until(lambda: cluster.asked("n1") == 3, "n0 has asked n1 three times")
        # One whether it is there already, four before the others are asked, and one for each time.
        assert counts["list"] <= 1 + 4 + 3 and counts["open"] == 0, counts
        await cluster.lose("n1")
        cluster.job("n0").accept(cluster.roster(["n0"], 2))
        assert (await asking.answer()).error.code == common_pb2.ERROR_CODE_NOT_FOUND


def test_pauses_double_and_stay_within_a_second() -> None:
    assert list(islice(flush_others.pauses(), 6)) == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0]
    looks = sum(1 for _ in takewhile(lambda at: at < NEVER_S, accumulate(flush_others.pauses())))
    assert looks <= 605  # 12,000 at 50 ms
