"""The receiving side of protection: seal records and chunks of peers, folded into parity.

Bytes are received, verified and folded on the threads of the bulk plane, block by block
in memory that stays in the processor's cache; the event loop is asked once per chunk.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from ckptd.daemon.bridge import Bridge
from ckptd.daemon.job import Job
from ckptd.daemon.settings import DaemonSettings
from ckptd.errors import CkptdError, CorruptImage, InvalidRequest, ProtocolMismatch
from ckptd.failpoints import failpoint
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES, mismatches
from ckptd.memory.bulk import BLOCK_CELLS, Connection
from ckptd.memory.change import Run, StripeMap, can_be_base, pieces, stripe_map, worthwhile
from ckptd.memory.fold import Base, Fold
from ckptd.memory.holding import Holding, chunk_cells, node_bytes, node_digests, seal_fault
from ckptd.memory.scratch import blocks
from ckptd.v1 import bulk_pb2

log = logging.getLogger("ckptd.protection")


class _Damaged(CorruptImage):
    """What came is not what was sealed."""


@dataclass
class _Ticket:
    """One peer's chunk that is being received."""

    job: Job
    holding: Holding
    fold: Fold
    stripe: int
    node: int
    chunk: int  # of the node's image; the number of the stripe's data symbol, too
    digests: bytes  # of all cells of the chunk that the image covers
    terms: bulk_pb2.Terms

    @functools.cached_property
    def runs(self) -> list[Run]:
        """The cells that travel; made on the peer's thread, as there may be many."""
        return self.fold.map_of(self.stripe).runs(self.chunk)


class Receiving:
    """Takes in what peers send for this node's parity.

    Args:
        sealed_by: called on the loop when a peer's seal record is new.
        folded: called on the loop when a fold is complete and digested.
    """

    def __init__(
        self,
        settings: DaemonSettings,
        bridge: Bridge,
        *,
        sealed_by: Callable[[Job, Holding], None],
        folded: Callable[[Job, Holding], None],
    ) -> None:
        self._settings = settings
        self._limit_bytes = settings.limit_bytes()
        self._bridge = bridge
        self._sealed_by = sealed_by
        self._folded = folded
        self.corrupt_cells = 0

    # On a bulk thread

    def take_seal(self, connection: Connection, frame: bulk_pb2.BulkHeader) -> None:
        """Notes a peer's seal record.

        Raises:
            CkptdError: sent to the peer as a refusal.
        """
        try:
            record = bulk_pb2.SealRecord.FromString(connection.receive_text(frame.payload_bytes))
        except DecodeError as error:
            raise InvalidRequest(f"the seal record of {frame.sender} does not parse", str(error)) from error
        self._bridge.on_loop(self._note_seal(frame, record))
        connection.send(bulk_pb2.BulkHeader(accepted=bulk_pb2.Accepted()))

    def take_chunk(self, connection: Connection, frame: bulk_pb2.BulkHeader) -> None:
        """Answers an offer with its terms, and folds what then comes.

        Raises:
            CkptdError: sent to the peer as a refusal.
        """
        ticket = self._bridge.on_loop(self._admit(frame))
        if ticket is None:
            connection.send(bulk_pb2.BulkHeader(terms=bulk_pb2.Terms(wanted=False)))
            return
        connection.send(bulk_pb2.BulkHeader(terms=ticket.terms))
        try:
            if self._take_frames(connection, ticket):
                self._finish(ticket)
                connection.send(bulk_pb2.BulkHeader(accepted=bulk_pb2.Accepted()))
        finally:
            if ticket.fold.cancelled:  # its slot may be waited for
                self._bridge.on_loop(self._stir(ticket.job))

    def _take_frames(self, connection: Connection, ticket: _Ticket) -> bool:
        """Folds what comes; False where the peer gives up."""
        while (frame := connection.receive()) is not None:
            if frame.WhichOneof("body") != "contribution":
                raise ProtocolMismatch("a contribution was expected", f"{frame.WhichOneof('body')} came")
            if frame.contribution.given_up:
                return False
            self._take_frame(connection, ticket, frame)
            if frame.contribution.final:
                return True
        return False

    def _take_frame(self, connection: Connection, ticket: _Ticket, frame: bulk_pb2.BulkHeader) -> None:
        contribution, count = frame.contribution, frame.payload_bytes // CELL_BYTES
        first, end = contribution.first, contribution.first + count
        travelling = ticket.runs[-1].end if ticket.runs else 0
        if frame.payload_bytes % CELL_BYTES or end > travelling:
            raise InvalidRequest(
                f"{frame.payload_bytes} bytes from cell {first} on", f"{travelling} whole cells travel"
            )
        runs = list(pieces(ticket.runs, first, end, BLOCK_CELLS))
        if any(run.raw == contribution.delta for run in runs):
            raise InvalidRequest("cells of another mode than agreed upon")
        told = contribution.digests
        if contribution.delta and len(told) != count * DIGEST_BYTES:
            raise InvalidRequest(f"{len(told)} bytes of digests", f"expected {count * DIGEST_BYTES}")
        for run in runs:
            if ticket.fold.cancelled:
                _discard(connection, run)  # the peer will hear of it
            elif run.raw:
                digests = _part(ticket.digests, run.cells.start, run.cells.stop)
                self._take_run(connection, ticket, run, digests)
            else:
                self._take_run(connection, ticket, run, _part(told, run.first - first, run.end - first))

    def _take_run(self, connection: Connection, ticket: _Ticket, run: Run, digests: bytes) -> None:
        received = False

        def receive(payload: memoryview) -> None:
            nonlocal received
            connection.receive_into(payload)
            failpoint("daemon.receiving")
            received = True
            if wrong := mismatches(payload, digests):
                self.corrupt_cells += len(wrong)
                raise _Damaged(f"cells of step {ticket.holding.step} changed on their way")

        try:
            ticket.fold.take(ticket.stripe, ticket.node, run, digests, blocks(1)[0], receive)
        except ValueError as error:
            if not ticket.fold.cancelled:
                raise InvalidRequest(
                    f"contribution to step {ticket.holding.step} refused", str(error)
                ) from error
            if not received:
                _discard(connection, run)
        except _Damaged:
            raise
        except CorruptImage as error:  # our own base
            self._bridge.on_loop(self._give_up(ticket, error))

    def _finish(self, ticket: _Ticket) -> None:
        fold = ticket.fold
        if fold.cancelled:
            return
        try:
            complete = fold.finish(ticket.stripe, ticket.node)
        except ValueError as error:
            raise InvalidRequest(f"contribution to step {ticket.holding.step} refused", str(error)) from error
        if not complete:
            return
        failpoint("daemon.folding")
        try:
            digests = fold.digests()
        except CorruptImage as error:
            self._bridge.on_loop(self._give_up(ticket, error))
            return
        self._bridge.on_loop(self._note_folded(ticket, digests))

    # On the loop

    async def _note_seal(self, frame: bulk_pb2.BulkHeader, record: bulk_pb2.SealRecord) -> None:
        job, step = self._bridge.job_of(frame), frame.seal.step
        fault = seal_fault(record, job.name, frame.header.generation, step, frame.sender)
        if fault is not None:
            raise InvalidRequest(f"the seal record of {frame.sender} is wrong", fault)
        holding = self._incoming(job, step)
        if holding is None:
            return
        if frame.sender not in holding.group or frame.sender == holding.position:
            raise InvalidRequest(f"node {frame.sender} is no peer of {self._settings.node} for step {step}")
        known = holding.seals.get(frame.sender)
        if known is not None and known != record:
            raise InvalidRequest(
                f"another seal record of {frame.sender} for step {step}", "a sealed image never changes"
            )
        if known is None:  # else it came again after a broken connection
            holding.seals[frame.sender] = record
            job.memory.save(holding)
            job.memory.stir()
            self._sealed_by(job, holding)

    def _incoming(self, job: Job, step: int) -> Holding | None:
        """The holding that a peer's bytes of `step` belong to, or None when they are not needed."""
        known = job.schedule
        if (known.has_watermark and step <= known.watermark) or step in job.aborted or step in known.aborted:
            return None
        if job.member is None:
            raise job.stale(job.generation)
        return job.memory.holdings.get((job.generation, step)) or job.new_holding(step)

    async def _admit(self, frame: bulk_pb2.BulkHeader) -> _Ticket | None:
        """The ticket for an offered chunk, or None where it is not needed."""
        job, offer = self._bridge.job_of(frame), frame.offer
        holding = self._incoming(job, offer.step)
        if holding is None or holding.folded:
            return None
        if frame.sender not in holding.seals or not holding.protected_group:
            raise InvalidRequest(f"no seal record of {frame.sender} for step {offer.step} came before")
        if not await self._all_sealed(job, holding):
            return None
        if offer.chunk_bytes != holding.chunk_bytes:
            raise InvalidRequest(
                f"chunks of {offer.chunk_bytes:,} bytes", f"expected {holding.chunk_bytes:,}"
            )
        node = holding.group.index(frame.sender)
        if not 0 <= offer.chunk < holding.geometry.data_chunks or (
            holding.geometry.stripe_of(node, offer.chunk) != offer.stripe
        ):
            raise InvalidRequest(f"chunk {offer.chunk} of {frame.sender} is not of stripe {offer.stripe}")
        fold = job.memory.folds.get(holding.key) or await self._begin_fold(job, holding)
        if fold is None or fold.done(offer.stripe, node):
            return None
        return self._ticket(job, holding, fold, node, offer)

    def _ticket(self, job: Job, holding: Holding, fold: Fold, node: int, offer: bulk_pb2.Offer) -> _Ticket:
        try:
            of_map = fold.map_of(offer.stripe)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        seal = holding.seals[holding.group[node]]
        first, count = chunk_cells(seal, offer.chunk, offer.chunk_bytes)
        terms = bulk_pb2.Terms(
            wanted=True,
            has_base=fold.base is not None,
            base_step=fold.base.step if fold.base is not None else 0,
            map_digest=of_map.digest,
            first=fold.next_of(offer.stripe, node),
        )
        digests = node_digests(seal)[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES]
        return _Ticket(job, holding, fold, offer.stripe, node, offer.chunk, digests, terms)

    async def _all_sealed(self, job: Job, holding: Holding) -> bool:
        """Waits for the seal records of the whole group; False when the step is given up meanwhile."""
        while job.memory.holdings.get(holding.key) is holding:
            if set(holding.seals) == set(holding.group):
                return not holding.folded
            await job.memory.freed.wait()
        return False

    async def _begin_fold(self, job: Job, holding: Holding) -> Fold | None:
        """Finds a parity slot, waiting for the watermark to free one; None if the step was given up."""
        chunk_bytes = holding.chunk_bytes
        if chunk_bytes > max(self._limit_bytes, node_bytes(holding.seals[holding.position])):
            raise InvalidRequest(
                f"chunks of {chunk_bytes:,} bytes", f"{self._limit_bytes:,} bytes may be held"
            )
        await job.memory.prepare_parity(job.slots, chunk_bytes * holding.parity_count)
        raw = self._maps(holding, None)
        while job.memory.holdings.get(holding.key) is holding and holding.key not in job.memory.folds:
            older = _newest_older(job, holding)
            useful = older is not None and can_be_base(holding, older)
            maps = self._maps(holding, older) if useful else raw
            if older is None or not useful or not worthwhile(maps, raw):
                older, maps = None, raw
            parity = job.place_parity(holding, chunk_bytes) if older is None or older.folded else None
            if parity is not None:
                base = None
                if older is not None:
                    assert older.parity is not None
                    base = Base(older.step, older.parity.chunks, older.parity.digests)
                holding.parity = parity
                fold = Fold(holding.geometry, holding.index, parity.chunks, maps, base)
                job.memory.folds[holding.key] = fold
                break
            await job.memory.freed.wait()
        return job.memory.folds.get(holding.key)

    def _maps(self, holding: Holding, base: Holding | None) -> list[StripeMap]:
        geometry = holding.geometry
        return [
            stripe_map(
                geometry,
                holding.group,
                geometry.parity_stripe(holding.index, p),
                holding.seals,
                base.seals if base is not None else None,
                holding.chunk_bytes,
            )
            for p in range(geometry.parity)
        ]

    async def _note_folded(self, ticket: _Ticket, digests: list[bytes]) -> None:
        job, holding = ticket.job, ticket.holding
        if job.memory.folds.get(holding.key) is not ticket.fold or holding.parity is None:
            return
        del job.memory.folds[holding.key]
        holding.parity.digests = digests
        self._folded(job, holding)
        job.memory.stir()

    async def _stir(self, job: Job) -> None:
        job.memory.stir()

    async def _give_up(self, ticket: _Ticket, error: CkptdError) -> None:
        log.error("step %d is given up: %s", ticket.holding.step, error)
        ticket.fold.cancel()
        ticket.job.abort(ticket.holding.step)
        ticket.job.suspect()


def _newest_older(job: Job, holding: Holding) -> Holding | None:
    """The newest step of this generation before `holding`'s.

    It is not released before `holding` is folded here: its watermark would have to be
    passed by a step in between, and there is none.
    """
    older = [
        h
        for h in job.memory.holdings.values()
        if h.generation == holding.generation and h.step < holding.step
    ]
    return max(older, key=lambda h: h.step, default=None)


def _discard(connection: Connection, run: Run) -> None:
    """Takes cells that nobody wants any more: a peer has begun to send them."""
    connection.receive_into(blocks(1)[0][: len(run.cells) * CELL_BYTES])


def _part(digests: bytes, first: int, end: int) -> bytes:
    return digests[first * DIGEST_BYTES : end * DIGEST_BYTES]
