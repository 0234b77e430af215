"""From captured to folded: digests, seal records, contributions out and in.

State is changed on the event loop only.  The threads of the bulk plane move and
code bytes, and ask the loop (`_on_loop`) for every decision.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from google.protobuf.message import DecodeError

from ckptd.daemon.bridge import Bridge
from ckptd.daemon.job import Job, rank_seal
from ckptd.daemon.serving import Serving
from ckptd.daemon.settings import DaemonSettings
from ckptd.errors import CorruptImage, InvalidRequest
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES, cell_digests, mismatches
from ckptd.memory.bulk import BLOCK_BYTES, BLOCK_CELLS, Connection
from ckptd.memory.fold import Fold
from ckptd.memory.holding import Holding, chunk_cells, node_bytes, node_digests, seal_fault
from ckptd.memory.peer import Peer, Work
from ckptd.v1 import bulk_pb2, common_pb2

log = logging.getLogger("ckptd.protection")


class Protection:
    """Protects the jobs of one node together with its peers."""

    def __init__(
        self,
        settings: DaemonSettings,
        jobs: Mapping[str, Job],
        loop: asyncio.AbstractEventLoop,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._loop = loop
        self._pool = pool
        self._limit_bytes = settings.limit_bytes()
        self._bridge = Bridge(settings, jobs, loop)
        self._serving = Serving(settings, self._bridge)
        self._peers: dict[str, Peer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.corrupt_cells = 0

    # On the loop: decisions

    def follow(self, job: Job) -> None:
        """Keeps a connection to every other member of the job's group, and to nobody else."""
        wanted: dict[str, str] = {}
        for other in self._jobs.values():
            if other.member is not None:
                wanted |= {n: other.address_of(n) for n in other.group if n != self._settings.node}
        for node, peer in list(self._peers.items()):
            if wanted.get(node) != peer.address:
                self._peers.pop(node).close()
        for node, address in wanted.items():
            if node not in self._peers:
                self._peers[node] = self._connect(node, address)
        # A connection that stays broken is news to this generation, and to another job.
        job.unreachable |= {n for n in job.group if n in self._peers and self._peers[n].lost}
        self.resend(job)

    def captured(self, job: Job, holding: Holding, rank: int) -> None:
        """Digests an image that lies complete in its slot."""
        job.digesting += 1
        self._spawn(self._digest(job, holding, rank))

    def sealed(self, job: Job, holding: Holding) -> None:
        """The node's image is final: tell the group, and contribute once everybody is."""
        holding.folded = (
            holding.folded or not holding.protected_group
        )  # a group too small for parity has nothing to fold
        job.memory.save(holding)
        if holding.protected_group:
            self._send_seal(job, holding)
            self._contribute(job, holding)
        job.changed()

    def resend(self, job: Job, node: str | None = None) -> None:
        """Queues again what a peer may lack: seals and contributions of steps not yet protected."""
        for holding in sorted(job.memory.holdings.values(), key=lambda h: h.step):
            if holding.sealed and holding.protected_group and self._unprotected(job, holding):
                self._send_seal(job, holding, node)
                self._contribute(job, holding, node)

    def close(self) -> None:
        """Ends every connection."""
        for peer in self._peers.values():
            peer.close()

    async def _digest(self, job: Job, holding: Holding, rank: int) -> None:
        place = holding.places[rank]
        try:
            digests = await self._loop.run_in_executor(self._pool, cell_digests, place.image)
        finally:
            job.digesting -= 1
        if job.memory.holdings.get(holding.key) is not holding:
            job.changed()
            return
        if holding.seal_rank(rank_seal(rank, place, digests), job.name):
            self.sealed(job, holding)
        job.changed()

    def _unprotected(self, job: Job, holding: Holding) -> bool:
        known = job.schedule
        done = known.has_watermark and holding.step <= known.watermark
        return holding.generation == job.generation and not done

    def _wanted(self, job: Job, holding: Holding) -> Callable[[], bool]:
        return lambda: job.memory.holdings.get(holding.key) is holding and self._unprotected(job, holding)

    def _header(self, job: Job) -> common_pb2.Header:
        timeout = int(self._settings.bulk_timeout_s * 1000)
        return common_pb2.Header(job=job.name, generation=job.generation, timeout_ms=timeout)

    def _send_seal(self, job: Job, holding: Holding, only: str | None = None) -> None:
        text = holding.seals[holding.position].SerializeToString()
        header = bulk_pb2.BulkHeader(
            header=self._header(job), sender=self._settings.node, seal=bulk_pb2.Seal(step=holding.step)
        )

        def send(connection: Connection) -> None:
            connection.request(header, [memoryview(text)])

        for node in holding.group:
            if node in self._peers and only in (None, node):
                self._peers[node].enqueue(Work(send, self._wanted(job, holding)))

    def _contribute(self, job: Job, holding: Holding, only: str | None = None) -> None:
        """Sends each data chunk to the nodes that hold its stripe's parity, once all seals are known."""
        if not holding.sealed or set(holding.seals) != set(holding.group):
            return
        geometry = holding.geometry
        for chunk in range(geometry.data_chunks):
            stripe = geometry.stripe_of(holding.index, chunk)
            for target in geometry.parity_nodes(stripe):
                node = holding.group[target]
                if node in self._peers and only in (None, node):
                    work = self._chunk_work(job, holding, stripe, chunk)
                    self._peers[node].enqueue(work)
        self._check_folded(job, holding)

    def _chunk_work(self, job: Job, holding: Holding, stripe: int, chunk: int) -> Work:
        header, wanted = self._header(job), self._wanted(job, holding)

        def send(connection: Connection) -> None:
            chunk_bytes = holding.chunk_bytes
            # Beyond the image there are zeros, which fold to nothing and need not travel.
            first_of_chunk, count = chunk_cells(holding.seals[holding.position], chunk, chunk_bytes)
            for first in range(0, max(count, 1), BLOCK_CELLS):
                if not wanted():
                    return  # given up meanwhile; the peer waits for nothing
                cells = min(BLOCK_CELLS, count - first)
                contribution = bulk_pb2.Contribution(
                    step=holding.step,
                    stripe=stripe,
                    chunk=chunk,
                    first_cell=first,
                    final=first + cells >= count,
                    chunk_bytes=chunk_bytes,
                )
                frame = bulk_pb2.BulkHeader(
                    header=header, sender=self._settings.node, contribution=contribution
                )
                connection.send(frame, holding.data_cells(first_of_chunk + first, cells) if cells else ())
            connection.answer()

        return Work(send, wanted)

    def _connect(self, node: str, address: str) -> Peer:
        def state(up: bool) -> None:
            self._loop.call_soon_threadsafe(self._set_reachable, node, up)

        def again() -> None:
            self._loop.call_soon_threadsafe(self._resend_all, node)

        return Peer(
            node,
            address,
            timeout_s=self._settings.bulk_timeout_s,
            nice=self._settings.bulk_nice,
            on_state=state,
            on_reconnected=again,
        )

    def _set_reachable(self, node: str, up: bool) -> None:
        for job in self._jobs.values():
            if node in job.group and (node in job.unreachable) == up:
                (job.unreachable.discard if up else job.unreachable.add)(node)
                for trainer in job.living():
                    job.push(trainer)
                job.changed()

    def _resend_all(self, node: str) -> None:
        for job in self._jobs.values():
            if node in job.group:
                self.resend(job, node)

    def _check_folded(self, job: Job, holding: Holding) -> None:
        """Folded: all contributions are in, and the seal records of the whole group are here."""
        parity = holding.parity
        if holding.folded or parity is None or not parity.digests:
            return
        if set(holding.seals) != set(holding.group):
            return
        if parity.chunk_bytes != holding.chunk_bytes:
            log.error("step %d was folded with chunks of another length; given up", holding.step)
            job.abort(holding.step)
            return
        holding.folded = True
        job.memory.save(holding)
        job.changed()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # On a bulk thread: frames from peers

    def handle(self, connection: Connection, frame: bulk_pb2.BulkHeader) -> None:
        """Serves one frame of a peer.

        Raises:
            CkptdError: sent to the peer as a refusal.
        """
        body = frame.WhichOneof("body")
        if body == "seal":
            self._take_seal(connection, frame)
        elif body == "contribution":
            self._take_contribution(connection, frame)
        elif body == "fetch":
            self._serving.fetch(connection, frame)
        else:
            raise InvalidRequest(f"a bulk frame with {body or 'nothing'} is no request")

    def _take_seal(self, connection: Connection, frame: bulk_pb2.BulkHeader) -> None:
        try:
            record = bulk_pb2.SealRecord.FromString(connection.receive_text(frame.payload_bytes))
        except DecodeError as error:
            raise InvalidRequest(f"the seal record of {frame.sender} does not parse", str(error)) from error
        self._bridge.on_loop(self._note_seal(frame, record))
        connection.send(bulk_pb2.BulkHeader(accepted=bulk_pb2.Accepted()))

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
        if holding.seals.get(frame.sender) != record:  # else it came again after a broken connection
            holding.seals[frame.sender] = record
            job.memory.save(holding)
            self._contribute(job, holding)
        self._check_folded(job, holding)

    def _incoming(self, job: Job, step: int) -> Holding | None:
        """The holding that a peer's bytes of `step` belong to, or None when they are not needed."""
        known = job.schedule
        if (known.has_watermark and step <= known.watermark) or step in job.aborted or step in known.aborted:
            return None
        if job.member is None:
            raise job.stale(job.generation)
        return job.memory.holdings.get((job.generation, step)) or job.new_holding(step)

    def _take_contribution(self, connection: Connection, frame: bulk_pb2.BulkHeader) -> None:
        contribution = frame.contribution
        if frame.payload_bytes > BLOCK_BYTES or frame.payload_bytes % CELL_BYTES:
            raise InvalidRequest("not whole cells", f"{frame.payload_bytes} bytes, at most {BLOCK_BYTES}")
        cells = memoryview(bytearray(frame.payload_bytes))
        connection.receive_into(cells)
        target = self._bridge.on_loop(self._fold_of(frame))
        if target is not None:
            holding, fold, node, total, digests = target
            if mismatches(cells, digests):
                self.corrupt_cells += 1
                raise CorruptImage(f"cells of step {contribution.step} changed on their way")
            try:
                fold.add(contribution.stripe, node, contribution.chunk, contribution.first_cell, cells)
                complete = contribution.final and fold.finish(contribution.stripe, node, total)
            except ValueError as error:
                raise InvalidRequest(
                    f"contribution to step {contribution.step} refused", str(error)
                ) from error
            if complete:
                self._bridge.on_loop(self._note_folded(holding, fold, fold.digests(), frame.header.job))
        if contribution.final:
            connection.send(bulk_pb2.BulkHeader(accepted=bulk_pb2.Accepted()))

    async def _fold_of(self, frame: bulk_pb2.BulkHeader) -> tuple[Holding, Fold, int, int, bytes] | None:
        """Where a contribution goes, its cells in all, and the digests that those sent now must have."""
        job, contribution = self._bridge.job_of(frame), frame.contribution
        holding = self._incoming(job, contribution.step)
        if holding is None or holding.folded:
            return None
        seal = holding.seals.get(frame.sender)
        if seal is None or not holding.protected_group:
            raise InvalidRequest(f"no seal record of {frame.sender} for step {contribution.step} came before")
        fold = job.memory.folds.get(holding.key) or await self._begin_fold(
            job, holding, contribution.chunk_bytes
        )
        if fold is None:
            return None
        assert holding.parity is not None
        if holding.parity.chunk_bytes != contribution.chunk_bytes:
            raise InvalidRequest(
                f"chunks of {contribution.chunk_bytes:,} bytes", f"expected {holding.parity.chunk_bytes:,}"
            )
        first_of_chunk, total = chunk_cells(seal, contribution.chunk, contribution.chunk_bytes)
        first = first_of_chunk + contribution.first_cell
        count = frame.payload_bytes // CELL_BYTES
        digests = node_digests(seal)[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES]
        if len(digests) != count * DIGEST_BYTES:
            raise InvalidRequest(f"cells beyond the end of {frame.sender}'s image")
        return holding, fold, holding.group.index(frame.sender), total, digests

    async def _begin_fold(self, job: Job, holding: Holding, chunk_bytes: int) -> Fold | None:
        """Finds a parity slot, waiting for the watermark to free one; None if the step was given up."""
        longest = max(node_bytes(seal) for seal in holding.seals.values())
        smallest = holding.geometry.chunk_bytes(longest)
        if chunk_bytes % CELL_BYTES or not smallest <= chunk_bytes <= max(smallest, self._limit_bytes):
            raise InvalidRequest(
                f"chunks of {chunk_bytes:,} bytes", f"whole cells, at least {smallest:,} bytes, expected"
            )
        while job.memory.holdings.get(holding.key) is holding and holding.key not in job.memory.folds:
            parity = job.place_parity(holding, chunk_bytes)
            if parity is not None:
                holding.parity = parity
                job.memory.folds[holding.key] = Fold(holding.geometry, holding.index, parity.chunks)
                break
            await job.memory.freed.wait()
        return job.memory.folds.get(holding.key)

    async def _note_folded(self, holding: Holding, fold: Fold, digests: list[bytes], name: str) -> None:
        job = self._jobs.get(name)
        if job is None or job.memory.folds.get(holding.key) is not fold or holding.parity is None:
            return
        del job.memory.folds[holding.key]
        holding.parity.digests = digests
        self._check_folded(job, holding)
