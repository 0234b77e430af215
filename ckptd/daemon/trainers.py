"""The trainers' UNIX socket: one task per connection, one method per frame."""

from __future__ import annotations

import asyncio
import logging
import socket
import stat
from pathlib import Path

from ckptd.daemon.admission import admit
from ckptd.daemon.frames import FrameLink, failure
from ckptd.daemon.job import Job, Trainer
from ckptd.daemon.node import Node
from ckptd.errors import (
    CkptdError,
    CorruptImage,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    ProtocolMismatch,
)
from ckptd.image.digest import digest_of_digests
from ckptd.image.names import check_name
from ckptd.protocol import PROTOCOL
from ckptd.v1 import coordinator_pb2, local_pb2

log = logging.getLogger("ckptd.trainers")

Transfer = coordinator_pb2.Transfer
_HELLO_S = 10.0
_CROWDED_S = 0.1  # a pause while no descriptor is free


class TrainerServer:
    """Listens on the daemon's UNIX socket."""

    def __init__(self, node: Node, path: Path, mode: int) -> None:
        self._node = node
        self._path = path
        self._tasks: set[asyncio.Task[None]] = set()
        clear_socket(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(str(path))
        except OSError as error:
            self._listener.close()
            raise InvalidRequest(
                f"cannot listen on {path}", error.strerror or str(error), "choose another --socket"
            ) from error
        path.chmod(mode)
        self._listener.listen(128)
        self._listener.setblocking(False)

    async def serve(self) -> None:
        """Accepts trainers until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                log.warning("cannot accept a trainer: %s", error)
                await asyncio.sleep(_CROWDED_S)
                continue
            task = loop.create_task(self._serve_one(FrameLink(sock)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()

    async def _serve_one(self, link: FrameLink) -> None:
        try:
            try:
                await _Session(self._node, link).run()
            except CkptdError as error:
                log.info("process %d: %s", link.pid, error)
                link.send(failure(error))
                await link.flush()
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("serving process %d failed", link.pid)
        finally:
            link.close()


def clear_socket(path: Path) -> None:
    """Removes a dead daemon's socket.

    Raises:
        InvalidRequest: the daemon behind it lives.
    """
    if not path.exists() or not stat.S_ISSOCK(path.lstat().st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            pass  # its backlog is full
        except OSError:
            path.unlink()
            return
    raise InvalidRequest(f"another daemon listens on {path}", "", "stop it, or choose another --socket")


class _Session:
    """One trainer's conversation."""

    def __init__(self, node: Node, link: FrameLink) -> None:
        self._node = node
        self._link = link
        self._job: Job
        self._trainer: Trainer
        self._left = False

    async def run(self) -> None:
        try:
            async with asyncio.timeout(_HELLO_S):
                first = await self._link.receive()
        except TimeoutError:
            return  # whoever connects and says nothing must not fill the daemon's descriptors
        if first is None:
            return
        await self._hello(first)
        while (message := await self._link.receive()) is not None:
            if self._left:
                continue
            try:
                await self._dispatch(message)
            except CkptdError as error:
                if self._stale():
                    raise
                self._link.send(failure(error))
            await self._link.room()
        self._node.disconnected(self._job, self._trainer)

    def _stale(self) -> bool:
        trainer = self._trainer
        return trainer.generation < self._job.generation or trainer.generation <= self._job.stop_through

    async def _hello(self, message: local_pb2.TrainerMessage) -> None:
        hello = message.hello
        if message.WhichOneof("body") != "hello" or hello.protocol != PROTOCOL:
            raise ProtocolMismatch(
                f"this trainer speaks protocol {hello.protocol}",
                f"the daemon of node {self._node.settings.node} speaks {PROTOCOL}",
                "run the same release of ckptd in the trainer and in the daemon",
            )
        check_name("job", message.header.job)
        self._job, self._trainer = await admit(self._node, self._link, message.header, hello)
        self._link.send(
            local_pb2.DaemonMessage(
                welcome=local_pb2.Welcome(
                    protocol=PROTOCOL,
                    generation=self._job.generation,
                    node=self._node.settings.node,
                    embedded=self._node.settings.embedded,
                    survives=self._node.survives,
                    memory_limit_bytes=self._node.limit_bytes(),
                    store=self._node.settings.store_url(),
                )
            )
        )
        self._job.push(self._trainer)

    async def _dispatch(self, message: local_pb2.TrainerMessage) -> None:
        body = message.WhichOneof("body")
        if body == "goodbye":
            self._left = True
            self._node.left(self._job, self._trainer, message.goodbye.park)
            return
        if self._node.jobs.get(self._job.name) is not self._job:
            raise NotFound(f"the memory of job {self._job.name} was freed", "", "attach again")
        if body == "failing":
            self._node.failing(self._job, self._trainer, message.failing.reason)
            return
        self._job.refuse_stale(self._trainer.generation)
        if body == "plan":
            await self._plan(message.plan)
        elif body == "captured":
            self._captured(message.captured)
        elif body == "aborted":
            self._trainer.held |= message.aborted.not_finite
            log.info(
                "rank %d gives up step %d: %s",
                self._trainer.rank,
                message.aborted.step,
                message.aborted.reason,
            )
            self._job.abort(message.aborted.step)
        elif body == "progress":
            self._trainer.step = message.progress.step
            self._node.changed()
        elif body == "accept":
            self._trainer.held = False
            self._node.changed()
        elif body == "reserve":
            self._reserve(message.reserve)
        elif body == "flush":
            self._node.flush.request(self._job, self._trainer, message.flush.step)
        elif body == "resumed":
            self._job.resumed_from = (message.resumed.generation, message.resumed.step)
            self._trainer.step = message.resumed.step  # no earlier step is to be named
            self._node.changed()
        elif body == "locate":
            await self._locate(message.header.timeout_ms / 1000)
        else:
            raise InvalidRequest(f"a frame with {body or 'nothing'} makes no sense here")

    async def _plan(self, plan: local_pb2.Plan) -> None:
        job, node = self._job, self._node
        await job.prepare(self._trainer, plan, node.limit_bytes(), node.held())
        job.refuse_stale(self._trainer.generation)
        arena = job.place_plan(self._trainer, plan, node.limit_bytes(), node.held())
        ready = local_pb2.ArenaReady(plan_hash=plan.plan_hash, slots=arena.slots, slot_bytes=arena.slot_bytes)
        self._link.send(local_pb2.DaemonMessage(arena_ready=ready), arena.fd)
        job.grant()

    def _captured(self, captured: local_pb2.Captured) -> None:
        holding = self._job.captured(self._trainer, captured)
        self._node.protection.captured(self._job, holding, self._trainer.rank)

    def _reserve(self, reserve: local_pb2.Reserve) -> None:
        node = self._node
        needed, available = self._job.check_budget(reserve.image_bytes, node.limit_bytes(), node.held())
        self._job.promised_bytes = max(self._job.promised_bytes, needed)
        reserved = local_pb2.Reserved(needed_bytes=needed, available_bytes=available)
        self._link.send(local_pb2.DaemonMessage(reserved=reserved))

    async def _locate(self, timeout_s: float) -> None:
        """Answers when the generation's start is verified here."""
        job, rank = self._job, self._trainer.rank
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        start = job.roster.start
        # A fresh start has no transfer to wait for.
        while start.step and job.transfer.state in (Transfer.STATE_UNSPECIFIED, Transfer.RUNNING):
            if loop.time() > deadline:
                raise DeadlineExceeded(f"job {job.name} is not restored within {timeout_s:g} s")
            await self._node.next_change(max(0.0, deadline - loop.time()))
            job.refuse_stale(self._trainer.generation)  # else it would get another generation's state
        if job.transfer.state == Transfer.FAILED:
            raise CorruptImage(
                f"job {job.name} cannot start from step {job.roster.start.step}",
                job.transfer.reason,
                "start again: the next newest step that verifies is taken",
            )
        rung = job.transfer.rung or "none"
        located = local_pb2.Located(step=start.step, rung=rung, verified=True)
        fd = None
        if start.step:
            holding = job.memory.holding_at(job.generation, start.step)
            place = holding.places[rank]
            located.digest = digest_of_digests(holding.rank_seals[rank].cell_digests)
            located.generation = start.generation
            located.slot, located.slot_bytes = place.slot, place.arena.slot_bytes
            located.image_bytes = place.image_bytes
            fd = place.arena.fd
        self._link.send(local_pb2.DaemonMessage(located=located), fd)
