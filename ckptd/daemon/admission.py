"""Who may train here: a trainer's Hello, checked against the job, its owner, and whoever holds the rank."""

from __future__ import annotations

import asyncio
import logging
import time

from ckptd.daemon.authority import lone_roster
from ckptd.daemon.frames import FrameLink, failure
from ckptd.daemon.job import Job, State, Trainer
from ckptd.daemon.node import Node
from ckptd.erasure.groups import MAX_PARITY
from ckptd.errors import InvalidRequest, RankTaken
from ckptd.storage import snapshot
from ckptd.v1 import common_pb2, coordinator_pb2, local_pb2

log = logging.getLogger("ckptd.daemon")

_MAX_LOCAL_RANKS = 1024
_MAX_SLOTS = 64


async def admit(
    node: Node, link: FrameLink, header: common_pb2.Header, hello: local_pb2.Hello
) -> tuple[Job, Trainer]:
    """Admits a trainer to its job.

    Raises:
        InvalidRequest, RankTaken, StaleGeneration, NotFound: nothing was changed.
    """
    _check_hello(hello)
    await _hand_over(node, header.job, link, hello)
    stored = await _stored(node, header.job)
    job = _job_for(node, link, header, hello)
    job.stored_generation = max(stored, job.stored_generation)
    if node.standalone and not hello.reconnect:
        _next_life(node, job, hello)
    elif header.generation:
        job.refuse_stale(header.generation)
    if job.member is None or hello.rank not in job.member.ranks:
        raise InvalidRequest(
            f"rank {hello.rank} of job {job.name} does not belong on node {node.settings.node}",
            f"its ranks are {list(job.member.ranks) if job.member else []}",
        )
    job.owner_uid = link.uid
    known = job.trainers.get(hello.rank)
    trainer = Trainer(hello.rank, job.generation, link.pid, link, attached=True)
    if known is not None and (known.pid, known.generation) == (link.pid, job.generation):
        trainer.step, trainer.held = known.step, known.held
    node.entered(job, trainer)
    return job, trainer


async def _stored(node: Node, name: str) -> int:
    """The newest generation in the store, where this node gives the generations.

    Memory from before a rollback is freed: the job goes on from where it was rolled back to.
    """
    known = node.jobs.get(name)
    if not node.standalone or (known is not None and known.living()):
        return 0
    found = await asyncio.to_thread(snapshot.generations, node.settings.store_url(), name)
    known = node.jobs.get(name)  # it may have come, or begun, meanwhile
    if known is not None and not known.living() and known.generation < found.start:
        log.warning("job %s was rolled back: its memory of generation %d is freed", name, known.generation)
        node.forget(name)
    return found.newest


def _job_for(node: Node, link: FrameLink, header: common_pb2.Header, hello: local_pb2.Hello) -> Job:
    if not node.standalone:
        if not header.generation:
            raise InvalidRequest(
                f"job {header.job} has no launcher that follows ckptd's orders",
                "CKPTD_GENERATION is not set, and this daemon has a coordinator",
                "start the job through a launcher that watches Orders (see docs/operations.md, 'Launchers')",
            )
        return node.job(header.job)
    if hello.world_size != hello.local_world_size:
        raise InvalidRequest(
            f"job {header.job} has {hello.world_size} ranks, {hello.local_world_size} of them here",
            "a daemon without a coordinator serves one node",
            "start `ckptd coordinator`, and `ckptd daemon --coordinator HOST:PORT` on every node",
        )
    job = node.make_job(header.job, link.uid)
    if not job.living():
        job.set_spec(
            coordinator_pb2.JobSpec(
                job=header.job,
                nodes=1,
                ranks_per_node=hello.local_world_size,
                parity=hello.parity,
                every=max(1, hello.every),
                slots=max(2, hello.slots),
            )
        )
    return job


async def _hand_over(node: Node, name: str, link: FrameLink, hello: local_pb2.Hello) -> None:
    """Waits for a dying trainer of the same rank; a living one keeps its place.

    Raises:
        InvalidRequest, RankTaken: the job is another user's; the trainer lives on.
    """
    deadline = time.monotonic() + node.settings.rank_handover_s
    while (job := node.jobs.get(name)) is not None:
        if job.owner_uid not in (-1, link.uid):
            raise InvalidRequest(
                f"job {name} belongs to uid {job.owner_uid}", f"this trainer has uid {link.uid}"
            )
        holder = _in_the_way(node, job, link, hello)
        if holder is None:
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise RankTaken(
                f"rank {holder.rank} of job {name} is held by process {holder.pid}",
                "it is alive",
                "end it first, or give this job another name",
            )
        await node.next_change(left)


def _in_the_way(node: Node, job: Job, link: FrameLink, hello: local_pb2.Hello) -> Trainer | None:
    """Another process that lives as this rank, or as any rank of a run of another size."""
    member = job.member
    resized = node.standalone and member is not None and len(member.ranks) != hello.world_size
    others = (t for t in job.trainers.values() if t.state == State.ALIVE and t.attached)
    return next((t for t in others if t.pid != link.pid and (resized or t.rank == hello.rank)), None)


def _next_life(node: Node, job: Job, hello: local_pb2.Hello) -> None:
    """Standalone: a trainer that comes after a death, or first, begins a new generation."""
    mine = [t for t in job.trainers.values() if t.generation == job.generation]
    complete = job.member is not None and len(job.member.ranks) == hello.world_size
    missing = mine and hello.rank not in {t.rank for t in mine}
    if complete and missing and all(t.state == State.ALIVE for t in mine):
        return  # the rest of a generation that is just forming
    roster = lone_roster(job, hello.world_size, (node.control_address, node.bulk_address))
    for trainer in mine:
        if trainer.state == State.ALIVE and trainer.link is not None:
            trainer.link.send(failure(job.stale(job.generation)))
    transfer = coordinator_pb2.TransferOrder(generation=roster.generation)
    node.follow(
        coordinator_pb2.JobDirective(
            job=job.name,
            spec=job.spec,
            roster=roster,
            stop_through=roster.generation - 1,
            transfer=transfer,
        )
    )


def _check_hello(hello: local_pb2.Hello) -> None:
    """
    Raises:
        InvalidRequest: numbers that no job has.
    """
    local, world = hello.local_world_size, hello.world_size
    if hello.rank >= world or not 0 < local <= min(world, _MAX_LOCAL_RANKS):
        raise InvalidRequest(
            f"rank {hello.rank} of {world} ranks, {local} of them on this node",
            f"a rank is smaller than the world size, and a node has 1 to {_MAX_LOCAL_RANKS} ranks",
        )
    if hello.slots > _MAX_SLOTS or hello.parity > MAX_PARITY:
        raise InvalidRequest(
            f"{hello.slots} slots and parity {hello.parity}", f"at most {_MAX_SLOTS} and {MAX_PARITY}"
        )
