"""From memory to storage: protected snapshots become durable, each node writing its own ranks' images.

The images are written from the slots that they lie in; those are given to nobody meanwhile.  With a
background flush every rank has one slot more, so that a flush never costs a snapshot.

A flush is of one generation and its roster: a newer one ends it, wherever it is.  Within a generation the
first node that gives a step up ends it for all, so that the next step is not held up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ckptd.daemon.flush_others import Others, leads, pauses
from ckptd.daemon.frames import wire_error
from ckptd.daemon.job import Job, Trainer
from ckptd.daemon.settings import DaemonSettings
from ckptd.errors import CkptdError, DeadlineExceeded, NotFound
from ckptd.memory.holding import Holding
from ckptd.memory.pace import Pace
from ckptd.memory.yielding import yield_to_training
from ckptd.storage import shares, snapshot
from ckptd.storage.store import Store
from ckptd.storage.writing import Heading
from ckptd.v1 import local_pb2

log = logging.getLogger("ckptd.flush")

_ASK_FROM_S = 0.5  # a wait with pauses as long as this is a long one: the others are asked, too
# Identity of the job (one that was forgotten may have a namesake), generation, step.
_Key = tuple[int, int, int]


class Flush:
    """Makes snapshots of one node's jobs durable; lives on the event loop.

    Args:
        next_change: returns at the next change of any fact, or after so many seconds.
    """

    def __init__(
        self, settings: DaemonSettings, jobs: Mapping[str, Job], next_change: Callable[[float], Any]
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._next_change = next_change
        # Writes, one after another, that yield to training.
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="flush", initializer=yield_to_training, initargs=(settings.bulk_nice,)
        )
        self._pace = Pace(settings.flush_bytes_per_s)
        self._tasks: dict[_Key, asyncio.Task[str]] = {}
        self._answers: set[asyncio.Task[None]] = set()
        self._closed = False

    def request(self, job: Job, trainer: Trainer, step: int) -> None:
        """A trainer asks for `step`; it hears when it is durable, or why it will not be."""
        task = asyncio.create_task(self._answer(trainer, step, self._begin(job, step)))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def run(self) -> None:
        """Begins the flushes that the schedules name, until cancelled."""
        while True:
            await self._next_change(1.0)
            for job in list(self._jobs.values()):
                step = job.schedule.flush
                if step > job.flush_ended and (id(job), job.generation, step) not in self._tasks:
                    self._begin(job, step)

    async def last(self, timeout_s: float) -> None:
        """This node is to end: returns when the newest protected step of every job is durable, or in time.

        The schedule names the step, so that all nodes write the same one; the trainers are told.
        """
        jobs = [j for j in self._jobs.values() if j.flush_every and j.member is not None and not j.finished]
        for job in jobs:
            job.leaving = True
            job.changed()
        wanted = {job.name: job.schedule.watermark if job.schedule.has_watermark else 0 for job in jobs}
        try:
            async with asyncio.timeout(timeout_s if jobs else 0.0):
                while any(job.flush_over < wanted[job.name] for job in jobs):
                    await self._next_change(1.0)
        except TimeoutError:
            late = [job.name for job in jobs if job.flush_over < wanted[job.name]]
            if late:
                log.error("not durable within %g s: jobs %s", timeout_s, ", ".join(late))

    def close(self) -> None:
        """Ends the thread; what it writes is left unfinished."""
        self._closed = True
        for task in [*self._tasks.values(), *self._answers]:
            task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self, job: Job, step: int) -> asyncio.Task[str]:
        key = (id(job), job.generation, step)
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(self._flush(job, step))
            task.add_done_callback(lambda done: self._ended(job, key, done))
            self._reckon(job)
        return task

    def _ended(self, job: Job, key: _Key, task: asyncio.Task[str]) -> None:
        del self._tasks[key]
        _, generation, step = key
        if job.generation == generation:
            job.flush_ended = max(job.flush_ended, step)
            self._reckon(job)
            job.changed()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("job %s: step %d did not become durable: %s", job.name, step, error)

    def _reckon(self, job: Job) -> None:
        """A flush that is under way is not over, whatever newer one has ended beside it."""
        own = (id(job), job.generation)
        running = [step for *whose, step in self._tasks if tuple(whose) == own]
        job.flush_over = min([job.flush_ended, *(step - 1 for step in running)])

    async def _answer(self, trainer: Trainer, step: int, flush: asyncio.Task[str]) -> None:
        answer = local_pb2.Flushed(step=step)
        try:
            answer.url = await asyncio.shield(flush)
        except CkptdError as error:
            answer.error.CopyFrom(wire_error(error))
        if trainer.link is not None:
            trainer.link.send(local_pb2.DaemonMessage(flushed=answer))

    async def _flush(self, job: Job, step: int) -> str:
        """Returns where the checkpoint is.

        Raises:
            NotFound: the step was given up, or the job went on without it.
            DeadlineExceeded: other nodes did not bring their parts.
            CkptdError: as the store says.
        """
        generation, start = job.generation, job.resumed_from
        ranks = sorted(rank for member in job.roster.members for rank in member.ranks)
        others = Others(job, step)
        await others.gone()  # so that one that is started anew from here on is known to be
        holding = await self._sealed(job, generation, step)
        with job.memory.occupied(holding.places.values()):
            await self._protected(job, generation, step)
            store, parent = await self._in_thread(self._places, job.name, generation, step, start)
            heading = Heading(job.name, step, generation, world_size=len(ranks), parent=parent)
            await self._written(job, store, heading, _images(holding), ranks, others)
        await self._published(job, store, heading, ranks, others)
        log.info("job %s: step %d is durable at %s", job.name, step, store.url)
        return str(store.url)

    async def _sealed(self, job: Job, generation: int, step: int) -> Holding:
        while True:
            holding = job.memory.holdings.get((generation, step))
            if holding is not None and holding.sealed:
                return holding
            self._check_wanted(job, generation, step)
            if holding is None and job.schedule.has_watermark and job.schedule.watermark >= step:
                raise NotFound(f"step {step} of job {job.name} is not in memory any more")
            await self._next_change(1.0)

    async def _protected(self, job: Job, generation: int, step: int) -> None:
        while not (job.schedule.has_watermark and job.schedule.watermark >= step):
            self._check_wanted(job, generation, step)
            await self._next_change(1.0)

    async def _written(
        self,
        job: Job,
        store: Store,
        heading: Heading,
        images: list[snapshot.SealedImage],
        ranks: list[int],
        others: Others,
    ) -> None:
        """Writes what these ranks are to write: what several of the job hold alike is written once."""
        offered = await self._in_thread(snapshot.described, images)
        shared: Mapping[int, shares.Share] | None = None
        if len(ranks) > 1:
            if await self._in_thread(snapshot.is_there, store, offered):
                return  # a flush of this step is over on other nodes: they offer nothing any more
            parts = [each.part for each in offered]
            await self._in_thread(shares.put_offers, store, parts)
            lacking = partial(shares.lacking, store, ranks)
            if leads(job):
                put = partial(shares.put_when_whole, store, ranks)
                await self._done(job, store, heading, others, put, lacking)
            read = partial(shares.read, store, parts)
            shared = await self._done(job, store, heading, others, read, None)
        # A node alone waits for nobody, and what it has begun is worth having.
        generation = heading.generation if others else None
        spend = partial(self._spend, job, generation)
        write = partial(snapshot.write_parts, compress=self._settings.compress, spend=spend)
        await self._in_thread(write, store, offered, shared)

    async def _published(
        self, job: Job, store: Store, heading: Heading, ranks: list[int], others: Others
    ) -> None:
        """Returns when there is a manifest; publishes it, if this node leads."""
        if leads(job):
            publish = partial(snapshot.publish_when_whole, store, heading, ranks)
            await self._done(job, store, heading, others, publish, partial(snapshot.lacking, store, ranks))
        else:
            await self._done(job, store, heading, others, partial(snapshot.is_published, store), None)

    async def _done(
        self,
        job: Job,
        store: Store,
        heading: Heading,
        others: Others,
        look: Callable[[], Any],
        lacking: Callable[[], set[int]] | None,
    ) -> Any:
        """Calls `look` until it returns something; what it waits for is up to other nodes.

        Args:
            lacking: the ranks of which there is nothing yet; None: what is awaited is the leader's to write.

        Raises:
            NotFound: one of those nodes gave the step up, or there is a newer generation.
            DeadlineExceeded: nobody knows why.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.flush_timeout_s
        waits = pauses()
        while True:
            pause = next(waits)
            # Asked before the look: what they had brought before they gave up is found by it.
            gone = await others.gone() if pause >= _ASK_FROM_S else {}
            if result := await self._in_thread(look):
                return result
            self._check_generation(job, heading.generation)
            if gone and lacking is not None:
                lacks = await self._in_thread(lacking)
                gone = {node: ranks for node, ranks in gone.items() if not lacks.isdisjoint(ranks)}
            if gone:
                raise NotFound(
                    f"step {heading.step} of job {job.name} was given up",
                    f"node {', '.join(gone)} does not bring its part",
                    "see the log of the daemon there; save a later step",
                )
            if loop.time() > deadline:
                raise DeadlineExceeded(
                    f"step {heading.step} of job {job.name} is not whole in {store.url}",
                    f"after {self._settings.flush_timeout_s:g} s some node has not written its part",
                    "see the daemons' logs; all of them need the same store (CKPTD_STORE)",
                )
            await self._pause(job, heading.generation, pause)

    async def _pause(self, job: Job, generation: int, seconds: float) -> None:
        """Returns after so many seconds, or when there is a newer generation."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while job.generation == generation and (left := end - loop.time()) > 0:
            await self._next_change(left)

    def _spend(self, job: Job, generation: int | None, nbytes: int) -> None:
        """Keeps the pace of a write; ends one that nobody needs any more.  Called by the thread.

        Args:
            generation: with which the write ends; None: with none.
        """
        if self._closed:
            raise NotFound(f"node {job.node} ends", "its flush was left unfinished")
        if generation is not None:
            self._check_generation(job, generation)
        self._pace.take(nbytes)

    def _places(self, job: str, generation: int, step: int, start: tuple[int, int]) -> Any:
        url = self._settings.store_url()
        store = snapshot.directory_of(url, job, step, generation)
        return store, snapshot.parent_of(url, job, generation, step, start)

    def _check_wanted(self, job: Job, generation: int, step: int) -> None:
        self._check_generation(job, generation)
        if step in job.aborted or step in job.schedule.aborted:
            raise NotFound(f"step {step} of job {job.name} was given up", "", "save a later step")

    def _check_generation(self, job: Job, generation: int) -> None:
        if job.generation != generation:
            raise NotFound(
                f"job {job.name} went on with generation {job.generation}", f"this is of {generation}"
            )

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _images(holding: Holding) -> list[snapshot.SealedImage]:
    return [
        snapshot.SealedImage(rank, holding.places[rank].image, holding.rank_seals[rank].cell_digests)
        for rank in holding.ranks
    ]
