"""Bringing the images that a generation starts from to this node, and verifying them."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from ckptd.daemon.job import Job
from ckptd.daemon.protection import Protection
from ckptd.daemon.settings import DaemonSettings
from ckptd.errors import CkptdError, CorruptImage, NoSpace, NotFound
from ckptd.image.digest import DIGEST_BYTES, mismatches
from ckptd.memory.holding import Holding, Place
from ckptd.memory.rebuild import Rebuild
from ckptd.memory.shares import collect
from ckptd.v1 import bulk_pb2, common_pb2, coordinator_pb2

log = logging.getLogger("ckptd.transfer")

State = coordinator_pb2.Transfer


class Transfers:
    """Carries out one transfer order per job; a newer generation makes the older one moot."""

    def __init__(
        self,
        settings: DaemonSettings,
        protection: Protection,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._settings = settings
        self._protection = protection
        self._pool = pool
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def order(self, job: Job, order: coordinator_pb2.TransferOrder) -> None:
        """Begins an order of the job's newest generation unless it was begun before."""
        if order.generation != job.generation or job.transfer.state != State.STATE_UNSPECIFIED:
            return
        job.transfer.state = State.RUNNING
        self._tasks[job.name] = asyncio.create_task(self._run(job, order))

    async def _run(self, job: Job, order: coordinator_pb2.TransferOrder) -> None:
        began = time.monotonic()
        outcome = coordinator_pb2.Transfer(generation=order.generation, state=State.VERIFIED, rung="none")
        try:
            if job.roster.start.step:
                outcome.rung, outcome.bytes = await self._bring(job, order)
        except CkptdError as error:
            log.error("job %s: cannot start from step %d: %s", job.name, job.roster.start.step, error)
            outcome.state, outcome.reason = State.FAILED, str(error)
        except Exception as error:  # the task's top frame: nobody else would hear of it
            log.exception("job %s: cannot start from step %d", job.name, job.roster.start.step)
            outcome.state, outcome.reason = State.FAILED, repr(error)
        outcome.seconds = time.monotonic() - began
        if job.generation != order.generation:
            return
        job.transfer.CopyFrom(outcome)
        if outcome.state == State.VERIFIED:
            holding = job.reseal_start()
            if holding is not None:
                self._protection.sealed(job, holding)
        job.changed()

    async def _bring(self, job: Job, order: coordinator_pb2.TransferOrder) -> tuple[str, int]:
        """Makes every image of the start step present and verified; returns (rung, bytes moved)."""
        start = job.roster.start
        if not order.positions:
            await self._verify(job, start)
            return "own-memory", 0
        moved = 0
        for position in order.positions:
            moved += await self._rebuild(job, order, position)
        mirrored = len(order.group) == order.parity + 1
        return ("replica" if mirrored else "parity"), moved

    async def _verify(self, job: Job, start: common_pb2.Snapshot) -> None:
        """Compares every cell of this node's images with its digest; what is wrong is unsealed."""
        holding = job.memory.holding_at(start.generation, start.step)
        if not holding.sealed:
            raise NotFound(f"step {start.step} is not sealed on node {job.node}")
        loop = asyncio.get_running_loop()
        for rank in holding.ranks:
            image, digests = holding.places[rank].image, holding.rank_seals[rank].cell_digests
            wrong = await loop.run_in_executor(self._pool, mismatches, image, digests)
            if wrong:
                del holding.rank_seals[rank]
                del holding.seals[holding.position]
                job.memory.save(holding)
                raise CorruptImage(
                    f"rank {rank}'s image of step {start.step} is damaged on node {job.node}",
                    f"{len(wrong)} of {len(digests) // DIGEST_BYTES} cells differ, first cell {wrong[0]}",
                )

    async def _rebuild(self, job: Job, order: coordinator_pb2.TransferOrder, position: str) -> int:
        start = job.roster.start
        rebuild = Rebuild(
            header=common_pb2.Header(
                job=job.name,
                generation=job.generation,
                timeout_ms=int(self._settings.bulk_timeout_s * 1000),
            ),
            sender=job.node,
            snapshot=(start.generation, start.step),
            position=position,
            group=list(order.group),
            parity=order.parity,
            sources=[(source.position, source.bulk_address) for source in order.sources],
            timeout_s=self._settings.bulk_timeout_s,
        )
        loop = asyncio.get_running_loop()
        seal = await loop.run_in_executor(self._pool, rebuild.fetch_seals)
        await self._prepare(job, seal)
        holding = self._place(job, order, seal)

        def still_wanted() -> None:
            if job.generation != order.generation:
                raise job.stale(order.generation)

        # Nobody else gets these slots while bytes come in, whatever becomes of this generation.
        with job.memory.occupied(holding.places.values()):
            await loop.run_in_executor(self._pool, collect, rebuild, holding, still_wanted)
        if job.generation != order.generation:
            return rebuild.received_bytes
        for rank in seal.ranks:
            holding.rank_seals[rank.rank] = rank
        holding.seals = dict(rebuild.seals)
        job.memory.holdings[holding.key] = holding
        job.memory.save(holding)
        return rebuild.received_bytes

    async def _prepare(self, job: Job, seal: bulk_pb2.SealRecord) -> None:
        """Makes the arenas that the lost position's ranks need, beside the loop."""
        for rank in seal.ranks:
            if job.memory.rank_arena(rank.rank, rank.plan_hash) is None:
                job.check_budget(rank.image_bytes, self._settings.limit_bytes(), {})
                await job.memory.prepare_rank_arena(
                    rank.rank, rank.plan_hash, job.places, rank.image_bytes, sparse=True
                )

    def _place(self, job: Job, order: coordinator_pb2.TransferOrder, seal: bulk_pb2.SealRecord) -> Holding:
        """A holding with a slot for every rank of the lost position, not yet entered into the job.

        Where this node held the position itself, with a damaged image, its parity is kept, since
        others may need it, and the damaged bytes are written over.
        """
        if job.generation != order.generation:
            raise job.stale(order.generation)
        start = job.roster.start
        old = job.memory.holdings.get((start.generation, start.step))
        if old is not None and old.position != seal.node:
            job.memory.release(old.key)
            old = None
        ranks = tuple(rank.rank for rank in seal.ranks)
        holding = Holding(start.generation, start.step, tuple(order.group), seal.node, order.parity, ranks)
        if old is not None:
            holding.parity, holding.folded = old.parity, old.folded
        for rank in seal.ranks:
            there = old.places.get(rank.rank) if old is not None else None
            fits = there is not None and there.arena.plan_hash == rank.plan_hash
            holding.places[rank.rank] = there if there is not None and fits else self._new_place(job, rank)
        return holding

    def _new_place(self, job: Job, rank: bulk_pb2.RankSeal) -> Place:
        arena = job.memory.rank_arena(rank.rank, rank.plan_hash)
        assert arena is not None  # made by _prepare
        free = job.memory.free_slots(arena)
        if not free:
            raise NoSpace(f"no slot of rank {rank.rank} is free on node {job.node}")
        return Place(arena, free[0], rank.image_bytes)
