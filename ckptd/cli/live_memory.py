"""What daemons still hold in memory of the snapshot that a stored checkpoint was made from.

The files that a job flushed are, byte for byte, the images of a snapshot, or shares of their arrays; while
that snapshot is in memory, its cells are the blocks of the files, or have the bytes of the arrays.  A node
that is gone is no hindrance: parity gives its cells, too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ckptd.cli import local
from ckptd.errors import CkptdError, CorruptImage, NotFound, Unreachable
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES, cell_digests
from ckptd.memory.bulk import Connection
from ckptd.memory.holding import node_bytes, node_digests
from ckptd.memory.rebuild import Rebuild
from ckptd.storage.lines import Key
from ckptd.v1 import bulk_pb2, common_pb2, coordinator_pb2, daemon_pb2

_SENDER: Final = "operator"
_TIMEOUT_S: Final = 10.0
_KEPT_CELLS: Final = 256  # small arrays share a cell, which is not fetched for each of them


@dataclass(frozen=True)
class _Group:
    """An erasure group of the snapshot's generation, and who stands for its positions now."""

    members: tuple[str, ...]
    parity: int
    sources: tuple[tuple[str, str], ...]  # (position, bulk address)


class LiveMemory:
    """A `ckptd.storage.remembered.Source`: what it gives is verified."""

    def __init__(self, job: str, snapshot: Key, generation: int, groups: Sequence[_Group]) -> None:
        header = common_pb2.Header(job=job, generation=generation, timeout_ms=int(_TIMEOUT_S * 1000))
        self._connections: dict[str, Connection] = {}
        self._cells: dict[bytes, tuple[Rebuild, int]] = {}  # digest -> (whose image, which cell of it)
        self._images: dict[int, tuple[int, bytes]] = {}  # rank -> (length of its image, digests of its cells)
        self._cell = functools.lru_cache(_KEPT_CELLS)(self._verified)
        for group in groups:
            seals: dict[str, bulk_pb2.SealRecord] = {}
            for position in group.members:
                # One dict for the whole group: each member's records are asked for once.
                rebuild = Rebuild(
                    header, _SENDER, snapshot, position, group.members, group.parity, group.sources,
                    _TIMEOUT_S, seals,
                )  # fmt: skip
                seal = rebuild.fetch_seals()
                self._images.update((each.rank, (each.image_bytes, each.cell_digests)) for each in seal.ranks)
                digests = node_digests(seal)
                for cell in range(len(digests) // DIGEST_BYTES):
                    digest = digests[cell * DIGEST_BYTES : (cell + 1) * DIGEST_BYTES]
                    self._cells.setdefault(digest, (rebuild, cell))

    def by_digest(self, digest: bytes, length: int) -> bytes | None:
        """Returns the first bytes of the cell with this digest, None where nobody has it any more."""
        data = self._cell(digest)
        return None if data is None else data[:length]

    def image_size(self, rank: int) -> int:
        """Returns the length of a rank's image in bytes.

        Raises:
            NotFound: no node of the snapshot has this rank.
        """
        return self._image(rank)[0]

    def image_bytes(self, rank: int, begin: int, end: int) -> bytes:
        """Returns the bytes begin .. end - 1 of a rank's image.

        Raises:
            NotFound: nobody has them all any more.
        """
        size, digests = self._image(rank)
        assert 0 <= begin <= end <= size
        found = bytearray()
        first = begin // CELL_BYTES
        for cell in range(first, -(-end // CELL_BYTES)):
            data = self._cell(digests[cell * DIGEST_BYTES : (cell + 1) * DIGEST_BYTES])
            if data is None:
                raise NotFound(f"cell {cell} of rank {rank}'s image is in nobody's memory any more")
            found += data
        return bytes(found[begin - first * CELL_BYTES : end - first * CELL_BYTES])

    def _image(self, rank: int) -> tuple[int, bytes]:
        if rank not in self._images:
            raise NotFound(f"the image of rank {rank} is in nobody's memory")
        return self._images[rank]

    def _verified(self, digest: bytes) -> bytes | None:
        found = self._cells.get(digest)
        if found is None:
            return None
        rebuild, cell = found
        for give in (_fetched, _decoded):
            with contextlib.suppress(CkptdError):  # reused since, unreachable, or damaged there too
                data = give(self._connections, rebuild, cell)
                if data is not None and cell_digests(data) == digest:
                    return bytes(data)
        return None

    def close(self) -> None:
        """Ends the connections."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()


@contextlib.contextmanager
def holding(target: str | None, job: str, snapshot: Key) -> Iterator[LiveMemory | None]:
    """Yields what daemons hold of a snapshot; None where there is no daemon, or none holds it.

    Args:
        target: gRPC target of one daemon; the others of the job are found through it.
        snapshot: (generation, step).
    """
    memory = None
    with contextlib.suppress(CkptdError):
        memory = None if target is None else _find(target, job, snapshot)
    try:
        yield memory
    finally:
        if memory is not None:
            memory.close()


def _find(target: str, job: str, snapshot: Key) -> LiveMemory | None:
    report = _report(target, job)
    if report is None:
        return None
    sources: dict[tuple[tuple[str, ...], int], list[tuple[str, str]]] = {}
    for member in report.roster.members:
        with contextlib.suppress(Unreachable):
            told = _report(member.control_address, job)
            for held in told.holdings if told is not None else ():
                if (held.generation, held.step) == snapshot and (held.sealed or held.folded):
                    group = (tuple(held.group), held.parity)
                    sources.setdefault(group, []).append((held.position, member.bulk_address))
    groups = [_Group(*group, tuple(there)) for group, there in sources.items()]
    return LiveMemory(job, snapshot, report.generation, groups) if groups else None


def _report(target: str, job: str) -> coordinator_pb2.JobReport | None:
    with local.daemon(target) as stub:
        reply: Any = stub.Status(
            daemon_pb2.DaemonStatusRequest(header=local.header()), timeout=local.TIMEOUT_S
        )
    return next((each for each in reply.jobs if each.job == job), None)


def _fetched(connections: dict[str, Connection], rebuild: Rebuild, cell: int) -> memoryview | None:
    """A cell of an image as it lies in the memory of whoever stands for its position."""
    seal = rebuild.seals[rebuild.position]
    generation, step = rebuild.snapshot
    fetch = bulk_pb2.Fetch(
        snapshot_generation=generation,
        step=step,
        position=rebuild.position,
        first_cell=cell,
        cells=1,
        chunk_bytes=node_bytes(seal),
    )
    for address in [address for position, address in rebuild.sources if position == rebuild.position]:
        if address not in connections:
            connections[address] = Connection.open(address, rebuild.timeout_s)
        connection = connections[address]
        try:
            answer = connection.request(
                bulk_pb2.BulkHeader(header=rebuild.header, sender=_SENDER, fetch=fetch)
            )
            data = memoryview(bytearray(CELL_BYTES))
            if answer.payload_bytes != len(data):
                raise CorruptImage("a cell of another length", f"{answer.payload_bytes} bytes")
            connection.receive_into(data)
        except CkptdError:
            connections.pop(address).close()
            raise
        return data
    return None


def _decoded(connections: dict[str, Connection], rebuild: Rebuild, cell: int) -> memoryview | None:
    """The same from the other members of the group; None where there is no parity."""
    if not 1 <= rebuild.parity < len(rebuild.group):
        return None
    chunk, first = divmod(cell, rebuild.chunk_bytes // CELL_BYTES)
    return rebuild.cells(chunk, first, 1)
