"""From captured to folded: digests, seal records, contributions out and in.

State is changed on the event loop only.  The threads of the bulk plane move and
code bytes, and ask the loop (`Bridge`) for every decision.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ckptd.daemon.bridge import Bridge
from ckptd.daemon.contributing import Chunk
from ckptd.daemon.job import Job, rank_seal
from ckptd.daemon.receiving import Receiving
from ckptd.daemon.serving import Serving
from ckptd.daemon.settings import DaemonSettings
from ckptd.errors import CorruptImage, InvalidRequest
from ckptd.failpoints import failpoint
from ckptd.image.digest import cell_digests
from ckptd.memory.bulk import Connection, message
from ckptd.memory.holding import Holding
from ckptd.memory.pace import Pace
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
        self._bridge = Bridge(settings, jobs, loop)
        self._serving = Serving(settings, self._bridge)
        self._receiving = Receiving(settings, self._bridge, sealed_by=self._contribute, folded=self._folded)
        self._pace = Pace(settings.bulk_bytes_per_s)
        self._peers: dict[str, Peer] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def corrupt_cells(self) -> int:
        """Cells that came in damaged."""
        return self._receiving.corrupt_cells

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
        failpoint("daemon.sealed")
        job.memory.stir()
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
        failpoint("daemon.captured")
        try:
            digests = await self._loop.run_in_executor(self._pool, cell_digests, place.image)
        finally:
            job.digesting -= 1
        if job.memory.holdings.get(holding.key) is not holding:
            job.changed()
            return
        failpoint("daemon.digested")
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
            connection.request(header, message(text))

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

    def _chunk_work(self, job: Job, holding: Holding, stripe: int, chunk: int) -> Work:
        wanted = self._wanted(job, holding)
        each = Chunk(
            header=self._header(job),
            sender=self._settings.node,
            holding=holding,
            stripe=stripe,
            chunk=chunk,
            base_at=lambda step: job.memory.holdings.get((holding.generation, step)),
            wanted=wanted,
            pace=self._pace,
        )

        def send(connection: Connection) -> None:
            try:
                each.send(connection)
            except CorruptImage as error:
                if wanted():  # else the slot may be another step's already
                    log.error("step %d cannot be protected: %s", holding.step, error)
                    self._bridge.tell(job.give_up, holding)

        return Work(send, wanted)

    def _connect(self, node: str, address: str) -> Peer:
        def state(up: bool) -> None:
            self._bridge.tell(self._set_reachable, node, up)

        def again() -> None:
            self._bridge.tell(self._resend_all, node)

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

    def _folded(self, job: Job, holding: Holding) -> None:
        """This node's parity of the step holds all contributions, and is digested."""
        failpoint("daemon.folded")
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
            self._receiving.take_seal(connection, frame)
        elif body == "offer":
            self._receiving.take_chunk(connection, frame)
        elif body == "fetch":
            self._serving.fetch(connection, frame)
        elif body == "decode":
            self._serving.decode(connection, frame)
        else:
            raise InvalidRequest(f"a bulk frame with {body or 'nothing'} is no request")
