"""Several nodes in one process: real arenas, real bulk plane, directives by hand."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ckptd.daemon.job import Job, Trainer
from ckptd.daemon.node import Node
from ckptd.daemon.settings import DaemonSettings
from ckptd.image.digest import CELL_BYTES
from ckptd.memory.bulk import BulkServer
from ckptd.v1 import common_pb2, coordinator_pb2, local_pb2

JOB = "job"
PLAN = b"p" * 16


async def until(condition: Callable[[], bool], what: str, deadline_s: float = 20.0) -> None:
    """Waits until `condition` holds; fails with `what` after the deadline."""
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    while not condition():
        assert loop.time() < end, f"not within {deadline_s} s: {what}"
        await asyncio.sleep(0.002)


class Cluster:
    """Nodes n0, n1, ... of one job, with images of seeded random bytes."""

    def __init__(self, root: Path, count: int, parity: int, ranks_per_node: int = 1, slots: int = 3) -> None:
        self.root = root
        self.parity = parity
        self.ranks_per_node = ranks_per_node
        self.slots = slots
        self.pool = ThreadPoolExecutor(4)
        self.nodes: dict[str, Node] = {}
        self.servers: dict[str, BulkServer] = {}
        for index in range(count):
            self.add(f"n{index}")

    def add(self, name: str) -> Node:
        directory = self.root / name
        directory.mkdir(parents=True, exist_ok=True)
        settings = DaemonSettings(
            node=name, memory_dir=directory, coordinator="127.0.0.1:1", bulk_timeout_s=5.0, bulk_nice=0
        )
        node = Node(settings, self.pool)
        server = BulkServer("127.0.0.1:0", node.protection.handle, 5.0, 0)
        node.bulk_address = server.address
        self.nodes[name], self.servers[name] = node, server
        return node

    def kill(self, name: str) -> None:
        """The node is gone: nobody answers at its address."""
        self.servers.pop(name).close()
        self.nodes.pop(name).close()

    def close(self) -> None:
        for name in list(self.nodes):
            self.kill(name)
        self.pool.shutdown()

    def job(self, name: str) -> Job:
        return self.nodes[name].jobs[JOB]

    def roster(self, names: list[str], generation: int, start: tuple[int, int] = (0, 0)) -> common_pb2.Roster:
        per = self.ranks_per_node
        members = [
            common_pb2.Member(
                node=name,
                ranks=range(i * per, (i + 1) * per),
                control_address="127.0.0.1:1",
                bulk_address=self.nodes[name].bulk_address,
            )
            for i, name in enumerate(names)
        ]
        return common_pb2.Roster(
            generation=generation,
            members=members,
            parity=self.parity,
            start=common_pb2.Snapshot(generation=start[0], step=start[1]),
        )

    def direct(self, names: list[str], roster: common_pb2.Roster, **wishes: object) -> None:
        spec = coordinator_pb2.JobSpec(job=JOB, parity=self.parity, every=1, slots=self.slots)
        for name in names:
            directive = coordinator_pb2.JobDirective(job=JOB, spec=spec, roster=roster, **wishes)  # type: ignore[arg-type]
            self.nodes[name].follow(directive)

    def schedule(
        self, names: list[str], generation: int, due: list[int], watermark: int | None = None
    ) -> None:
        message = common_pb2.Schedule(
            generation=generation, due=due, has_watermark=watermark is not None, watermark=watermark or 0
        )
        for name in names:
            copy = common_pb2.Schedule()
            copy.CopyFrom(message)
            self.job(name).apply(copy)

    def plan(self, name: str, image_bytes: int) -> None:
        """Trainers of all ranks of a node attach and bring their plan."""
        job = self.job(name)
        assert job.member is not None
        for rank in job.member.ranks:
            trainer = Trainer(rank, job.generation, 0, attached=True)
            job.trainers[rank] = trainer
            job.place_plan(trainer, local_pb2.Plan(plan_hash=PLAN, image_bytes=image_bytes), 1 << 40, {})
        job.grant()

    def capture(self, name: str, step: int, seed: int = 0) -> None:
        """All ranks of a node capture their image of `step`."""
        job = self.job(name)
        for trainer in job.living():
            place = job.grants[trainer.rank][step]
            place.image[:] = image(trainer.rank, step, place.image_bytes, seed)
            captured = local_pb2.Captured(step=step, slot=place.slot, plan_hash=PLAN)
            holding = job.captured(trainer, captured)
            self.nodes[name].protection.captured(job, holding, trainer.rank)

    def folded(self, step: int, names: list[str], generation: int = 1) -> bool:
        return all(
            (h := self.job(name).memory.holdings.get((generation, step))) is not None and h.folded
            for name in names
        )


def image(rank: int, step: int, nbytes: int, seed: int = 0) -> bytes:
    """The bytes of a rank's image, the same whoever asks."""
    return random.Random(f"{seed}-{rank}-{step}").randbytes(nbytes)


SIZES = [1, CELL_BYTES, 3 * CELL_BYTES + 17, 40 * CELL_BYTES + 1]
