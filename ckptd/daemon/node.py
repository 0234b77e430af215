"""The daemon's centre: its jobs, and what every other part asks of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor

from ckptd.address import host_of
from ckptd.daemon.adopt import adopt
from ckptd.daemon.authority import Authority
from ckptd.daemon.flush import Flush
from ckptd.daemon.frames import failure
from ckptd.daemon.job import Job, State, Trainer, held_by
from ckptd.daemon.protection import Protection
from ckptd.daemon.scrub import Scrub
from ckptd.daemon.settings import DaemonSettings
from ckptd.daemon.transfer import Transfers
from ckptd.errors import InvalidRequest, NotFound
from ckptd.memory import records
from ckptd.protocol import PROTOCOL
from ckptd.v1 import common_pb2, coordinator_pb2

log = logging.getLogger("ckptd.daemon")


class Node:
    """One node's daemon; lives on the event loop.

    Args:
        control_address, bulk_address: as peers and launchers reach this daemon.
    """

    def __init__(self, settings: DaemonSettings, pool: ThreadPoolExecutor) -> None:
        self.settings = settings
        self.incarnation = secrets.randbits(63) | 1
        self.control_address = settings.listen
        self.bulk_address = settings.bulk
        self.coordinator_connected = False
        self._pool = pool
        self._limit_bytes = settings.limit_bytes()
        self.jobs: dict[str, Job] = {}
        self._authorities: dict[str, Authority] = {}
        self._pulse = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle_since: dict[str, float] = {}
        loop = asyncio.get_running_loop()
        self.protection = Protection(settings, self.jobs, loop, pool)
        self.transfers = Transfers(settings, self.protection, pool)
        self.scrub = Scrub(settings, self.jobs)
        self.flush = Flush(settings, self.jobs, self.next_change)
        self._rendezvous = self._reserve_port()

    @property
    def standalone(self) -> bool:
        """Whether this node serves its jobs alone, with no coordinator over it."""
        return not self.settings.coordinator

    @property
    def survives(self) -> str:
        """One sentence for the user: which losses this installation survives."""
        if self.standalone:
            return "rank deaths on this node; not node loss: no peers, start `ckptd daemon` on every node"
        return "rank deaths, and the loss of as many nodes of a group as the job has parity"

    def adopt(self) -> None:
        """Takes over what an earlier daemon of this node left in memory."""
        self.jobs.update(adopt(self.settings.memory_dir, self.settings.node, self.changed))
        for job in self.jobs.values():
            job.flush_every = self.settings.flush_every
            for trainer in job.trainers.values():
                if trainer.state == State.ALIVE:
                    self.watch(job, trainer)
            self.protection.follow(job)

    # Change

    def changed(self) -> None:
        """Some fact changed: wake whoever reports, orders or schedules."""
        self._pulse.set()
        self._pulse = asyncio.Event()

    @property
    def pulse(self) -> asyncio.Event:
        """Set at the next change of a fact.

        Who lets others run between looking at the facts and waiting takes it first: what changes
        in between would not be noticed by `next_change`.
        """
        return self._pulse

    async def next_change(self, timeout_s: float) -> None:
        """Returns at the next change of a fact, or after `timeout_s`."""
        # Not wait_for, which in Python 3.11 may swallow the cancellation that ends the daemon.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._pulse.wait()

    # Memory

    def limit_bytes(self) -> int:
        return self._limit_bytes

    def held(self) -> dict[str, int]:
        """Bytes that every job takes here."""
        return held_by(self.jobs.values())

    # Jobs

    def job(self, name: str) -> Job:
        """
        Raises:
            NotFound: no such job on this node.
        """
        if name not in self.jobs:
            raise NotFound(f"node {self.settings.node} has no job {name}", "", "see 'ckptd status'")
        return self.jobs[name]

    def make_job(self, name: str, owner_uid: int) -> Job:
        """The job of that name, made where there is none."""
        if name not in self.jobs:
            directory = records.job_directory(self.settings.memory_dir, name)
            directory.mkdir(parents=True, exist_ok=True)
            self.jobs[name] = Job(
                name,
                self.settings.node,
                directory,
                owner_uid,
                self.changed,
                flush_every=self.settings.flush_every,
            )
        return self.jobs[name]

    def follow(self, directive: coordinator_pb2.JobDirective) -> None:
        """Does what the coordinator (or this node's own authority) wishes of one job."""
        job = self.make_job(directive.job, -1)
        job.set_spec(directive.spec)
        if directive.roster.generation > job.generation:
            job.directory.mkdir(parents=True, exist_ok=True)  # it is gone once a job has finished
            job.accept(directive.roster)
            self.protection.follow(job)
        if directive.stop_through > job.stop_through:
            job.order_stop(directive.stop_through)
            self._dismiss(job)
        if directive.roster.generation < job.generation:
            return  # a coordinator that does not know better yet
        if directive.HasField("transfer"):
            self.transfers.order(job, directive.transfer)
        if directive.HasField("start"):
            job.order_start(directive.start)
        if directive.HasField("schedule"):
            job.apply(directive.schedule)
        if directive.finished and not job.finished:
            self._finish(job)

    def forget(self, name: str) -> int:
        """Frees a job's memory; returns the bytes freed.

        Raises:
            NotFound, InvalidRequest: no such job; trainers are attached.
        """
        job = self.job(name)
        if job.living():
            ranks = ", ".join(str(t.rank) for t in job.living())
            raise InvalidRequest(
                f"job {name} is running on node {self.settings.node}", f"ranks {ranks}", "stop it first"
            )
        freed = sum(job.memory.nbytes())
        self._drop(job)
        return freed

    def _finish(self, job: Job) -> None:
        log.info("job %s: finished", job.name)
        job.finished = True
        if not any(t.parks for t in job.trainers.values()):
            job.discard()
        self.changed()

    def _drop(self, job: Job) -> None:
        job.discard()
        del self.jobs[job.name]
        self._authorities.pop(job.name, None)
        self._idle_since.pop(job.name, None)
        self.changed()

    # Trainers

    def entered(self, job: Job, trainer: Trainer) -> None:
        """A trainer was admitted: from here on it is watched."""
        job.trainers[trainer.rank] = trainer
        self._idle_since.pop(job.name, None)
        self.watch(job, trainer)
        job.save()
        self.changed()

    def watch(self, job: Job, trainer: Trainer) -> None:
        """Learns of the trainer's death from the kernel, at once.

        A trainer in another pid namespace (a container's) has no pid here: then the end of
        its connection is its end.
        """
        if not trainer.pid:
            return
        loop = asyncio.get_running_loop()
        try:
            fd = os.pidfd_open(trainer.pid)
        except OSError:
            loop.call_soon(self._died, job, trainer)
            return

        def ended() -> None:
            loop.remove_reader(fd)
            os.close(fd)
            # What it sent before it died is still in the socket, and counts.
            task = loop.create_task(self._after_last_words(job, trainer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        loop.add_reader(fd, ended)

    async def _after_last_words(self, job: Job, trainer: Trainer) -> None:
        if trainer.link is not None:
            await trainer.link.drained()
        self._died(job, trainer)

    def disconnected(self, job: Job, trainer: Trainer) -> None:
        """A trainer's connection ended; a process that can be watched may still come back."""
        if not trainer.pid:
            self._died(job, trainer)

    def _died(self, job: Job, trainer: Trainer) -> None:
        if trainer.state != State.ALIVE or job.trainers.get(trainer.rank) is not trainer:
            return
        trainer.state = State.DIED
        log.warning(
            "job %s: rank %d (process %d) died after step %d",
            job.name,
            trainer.rank,
            trainer.pid,
            trainer.step,
        )
        job.grants.pop(trainer.rank, None)
        job.save()
        self.changed()

    def left(self, job: Job, trainer: Trainer, park: bool) -> None:
        """A trainer said goodbye."""
        if self.jobs.get(job.name) is not job or job.trainers.get(trainer.rank) is not trainer:
            return  # what it belonged to is gone; another job may have its name by now
        trainer.state, trainer.parks = State.FINISHED, park
        job.save()
        mine = [t for t in job.trainers.values() if t.generation == job.generation]
        everybody = job.member is not None and len(mine) == len(job.member.ranks)
        if self.standalone and everybody and all(t.state == State.FINISHED for t in mine):
            self._finish(job)
            if not any(t.parks for t in mine):
                self._drop(job)
        self.changed()

    def failing(self, job: Job, trainer: Trainer, reason: str) -> None:
        """A trainer says that it ends because of an error; its process is still watched."""
        log.warning("job %s: rank %d ends after step %d: %s", job.name, trainer.rank, trainer.step, reason)
        trainer.failing, trainer.exit = True, reason
        job.grants.pop(trainer.rank, None)
        job.save()
        self.changed()

    def launched(self, job: Job, generation: int, rank: int, pid: int) -> None:
        """The launcher started a trainer; it is watched even before it attaches."""
        known = job.trainers.get(rank)
        if generation != job.generation or (known is not None and known.generation == generation):
            return
        trainer = job.trainers[rank] = Trainer(rank, generation, pid)
        self.watch(job, trainer)
        job.save()
        self.changed()

    def exited(self, job: Job, generation: int, rank: int, pid: int, status: int) -> None:
        """The launcher saw a trainer end."""
        trainer = job.trainers.get(rank)
        if trainer is None:
            trainer = job.trainers[rank] = Trainer(rank, generation, pid)
        if trainer.generation == generation:
            trainer.exit = f"signal {-status}" if status < 0 else f"exit {status}"
            self._died(job, trainer)
            self.changed()

    def _dismiss(self, job: Job) -> None:
        """Tells trainers of a stopped generation to end; their launcher sees to it."""
        for trainer in job.trainers.values():
            if trainer.link is not None and trainer.generation <= job.stop_through:
                trainer.link.send(failure(job.stale(trainer.generation)))

    # Reports and schedules

    def report(self, sequence: int) -> coordinator_pb2.NodeReport:
        """All facts of this node."""
        host, port = self._rendezvous.getsockname()[:2]
        return coordinator_pb2.NodeReport(
            header=common_pb2.Header(timeout_ms=1000),
            protocol=PROTOCOL,
            node=self.settings.node,
            incarnation=self.incarnation,
            sequence=sequence,
            domain=self.settings.domain,
            control_address=self.control_address,
            bulk_address=self.bulk_address,
            rendezvous_host=host,
            rendezvous_port=port,
            jobs=[job.report() for job in self.jobs.values()],
        )

    def reschedule(self, job: Job) -> common_pb2.Schedule:
        """Names steps here, because no coordinator does."""
        schedule = self._authorities.setdefault(job.name, Authority()).schedule(job)
        job.apply(schedule)
        return schedule

    def fold_facts(self, node: str, report: coordinator_pb2.JobReport) -> common_pb2.Schedule:
        """A member's facts while the coordinator is away; returns the schedule they lead to."""
        job = self.job(report.job)
        job.refuse_stale(report.generation)
        self._authorities.setdefault(job.name, Authority()).note(node, report)
        return self.reschedule(job)

    def release_port(self, order: coordinator_pb2.StartOrder) -> None:
        """Frees the reserved port for rank 0's process group, and reserves another."""
        if self._rendezvous.getsockname()[1] == order.master_port:
            old, self._rendezvous = self._rendezvous, self._reserve_port()
            old.close()

    def _reserve_port(self) -> socket.socket:
        # Bound but not listening: nobody else gets the port, and nobody connects to it.
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.bind((host_of(self.settings.listen), 0))
        return sock

    # Life

    def expire(self, now: float) -> None:
        """Frees jobs that have been parked for too long."""
        for job in list(self.jobs.values()):
            if any(t.state == State.ALIVE for t in job.trainers.values()):
                self._idle_since.pop(job.name, None)
            elif now - self._idle_since.setdefault(job.name, now) > self.settings.park_s:
                log.warning(
                    "job %s: no trainer for %.0f s, its memory is freed", job.name, self.settings.park_s
                )
                self._drop(job)

    def close(self) -> None:
        self.flush.close()
        self.scrub.close()
        self.protection.close()
        self._rendezvous.close()
