"""Rebuilding a lost node's image from the living members of its group.

A wrong cell is an erased cell: what does not match its digest is left out, and
another symbol takes its place as long as there is one.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from ckptd.erasure import Code
from ckptd.erasure.stripe import Geometry
from ckptd.errors import CkptdError, CorruptImage, NotEnoughCells
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES, cell_digests, mismatches
from ckptd.memory.bulk import BLOCK_CELLS, Connection, Refusal
from ckptd.memory.holding import node_bytes, node_digests, seal_fault
from ckptd.v1 import bulk_pb2, common_pb2

log = logging.getLogger("ckptd.rebuild")

ZERO_DIGEST = cell_digests(bytes(CELL_BYTES))
# Writes whole cells at a cell index of the rebuilt node image.
Sink = Callable[[int, memoryview], None]


@dataclass
class Rebuild:
    """One lost position of one snapshot.

    Args:
        header: of every request: job, generation (the present one), deadline.
        sender: this node's name.
        snapshot: the (generation, step) to rebuild.
        group: members of the old group in order; `parity` of it.
        sources: (position, bulk address) of everybody who stands for a position now; one that
            stands for the lost position gives its image as it is.
    """

    header: common_pb2.Header
    sender: str
    snapshot: tuple[int, int]
    position: str
    group: Sequence[str]
    parity: int
    sources: Sequence[tuple[str, str]]
    timeout_s: float
    seals: dict[str, bulk_pb2.SealRecord] = field(default_factory=dict)
    received_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fetch_seals(self) -> bulk_pb2.SealRecord:
        """Collects the seal records of the whole group; returns that of the lost position.

        Raises:
            NotEnoughCells: some record is nowhere to be had.
        """
        for holder, address in self.sources:
            for member in [member for member in self.group if member not in self.seals]:
                try:
                    self._fetch_seal(address, member)
                except Refusal as error:  # it may have those of others
                    log.info("seal record of %s from %s: %s", member, holder, error)
                except CkptdError as error:
                    log.warning("node %s (%s) gives no seal records: %s", holder, address, error)
                    break
        missing = [member for member in self.group if member not in self.seals]
        if missing:
            asked = ", ".join(sorted({position for position, _ in self.sources}))
            raise NotEnoughCells(
                f"step {self.snapshot[1]} of node {self.position} cannot be rebuilt",
                f"nobody of {asked} holds the seal records of {', '.join(missing)}",
            )
        return self.seals[self.position]

    def run(self, sink: Sink) -> None:
        """Rebuilds every cell and hands it, verified, to `sink` (called from several threads).

        Raises:
            NotEnoughCells: with how many symbols were needed and found.
        """
        geometry = Geometry(len(self.group), self.parity)
        chunks = range(geometry.data_chunks)
        with ThreadPoolExecutor(len(chunks), thread_name_prefix="rebuild") as pool:
            for job in [pool.submit(self._chunk, geometry, chunk, sink) for chunk in chunks]:
                job.result()

    def _fetch_seal(self, address: str, member: str) -> None:
        connection = Connection.open(address, self.timeout_s)
        try:
            answer = connection.request(self._request(position=member, seal_record=True))
            seal = bulk_pb2.SealRecord.FromString(connection.receive_text(answer.payload_bytes))
        except DecodeError as error:
            raise CorruptImage(f"the seal record of {member} does not parse", str(error)) from error
        finally:
            connection.close()
        fault = seal_fault(seal, self.header.job, *self.snapshot, member)
        if fault is not None:
            raise CorruptImage(f"the seal record of {member} is wrong", fault)
        self.seals[member] = seal

    def _request(self, **fields: object) -> bulk_pb2.BulkHeader:
        generation, step = self.snapshot
        fetch = bulk_pb2.Fetch(snapshot_generation=generation, step=step, **fields)  # type: ignore[arg-type]
        return bulk_pb2.BulkHeader(header=self.header, sender=self.sender, fetch=fetch)

    def _chunk(self, geometry: Geometry, chunk: int, sink: Sink) -> None:
        lost = self.group.index(self.position)
        chunk_bytes = geometry.chunk_bytes(max(node_bytes(seal) for seal in self.seals.values()))
        first_of_chunk = chunk * chunk_bytes // CELL_BYTES
        total = node_bytes(self.seals[self.position]) // CELL_BYTES
        count = min(chunk_bytes // CELL_BYTES, total - first_of_chunk)
        stripe = _Stripe(self, geometry, geometry.stripe_of(lost, chunk), chunk_bytes)
        digests = node_digests(self.seals[self.position])
        try:
            for first in range(0, count, BLOCK_CELLS):
                cells = min(BLOCK_CELLS, count - first)
                at = first_of_chunk + first
                expected = digests[at * DIGEST_BYTES : (at + cells) * DIGEST_BYTES]
                sink(at, stripe.decode(geometry.symbol_on(lost, stripe.index), first, cells, expected))
        finally:
            stripe.close()


class _Stripe:
    """The symbols of one stripe that can be had, and their connections."""

    def __init__(self, rebuild: Rebuild, geometry: Geometry, index: int, chunk_bytes: int) -> None:
        self.index = index
        self._rebuild = rebuild
        self._geometry = geometry
        self._chunk_bytes = chunk_bytes
        self._code = Code(geometry.data_chunks, geometry.parity)
        # Who may give a symbol; data first, since a data symbol costs no arithmetic.
        holders: dict[int, list[tuple[str, str]]] = {}
        for position, address in rebuild.sources:
            symbol = geometry.symbol_on(rebuild.group.index(position), index)
            holders.setdefault(symbol, []).append((position, address))
        self._holders = dict(sorted(holders.items()))
        self._connections: dict[str, Connection] = {}

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def decode(self, lost: int, first: int, cells: int, expected: bytes) -> memoryview:
        """The verified cells first.. of the symbol `lost` of this stripe.

        Raises:
            NotEnoughCells: with how many symbols were needed and found.
        """
        try:
            return self._decode(lost, first, cells, expected)
        except NotEnoughCells:
            if cells == 1:
                raise
        # Of one block different symbols may lack different cells, and each lacks only those.
        out = bytearray()
        for cell in range(cells):
            digest = expected[cell * DIGEST_BYTES : (cell + 1) * DIGEST_BYTES]
            out += self._decode(lost, first + cell, 1, digest)
        return memoryview(out)

    def _decode(self, lost: int, first: int, cells: int, expected: bytes) -> memoryview:
        whole = self._fetch(lost, first, cells)
        if whole is not None:
            return whole
        needed = self._geometry.data_chunks
        present: dict[int, memoryview] = {}
        tried: set[frozenset[int]] = set()
        for symbol in self._holders:
            part = self._fetch(symbol, first, cells) if symbol != lost else None
            if part is None:
                continue
            present[symbol] = part
            for chosen in itertools.combinations(present, needed):
                if frozenset(chosen) in tried:
                    continue
                tried.add(frozenset(chosen))
                out = memoryview(bytearray(cells * CELL_BYTES))
                self._code.decode({s: present[s] for s in chosen}, {lost: out})
                if not mismatches(out, expected):
                    return out
                log.warning("stripe %d: symbols %s do not give the sealed bytes", self.index, chosen)
        left = sorted({name for held in self._holders.values() for name, _ in held})
        raise NotEnoughCells(
            f"stripe {self.index} of step {self._rebuild.snapshot[1]} cannot be decoded",
            f"{needed} good symbols needed, {len(present)} found among {', '.join(left) or 'nobody'}",
        )

    def _fetch(self, symbol: int, first: int, cells: int) -> memoryview | None:
        """Verified cells of one symbol, or None; who cannot give any is not asked again."""
        for holder in list(self._holders.get(symbol, ())):
            try:
                part = self._fetch_from(holder, symbol, first, cells)
            except (CkptdError, ValueError) as error:
                log.warning("symbol %d of stripe %d from %s: %s", symbol, self.index, holder[0], error)
                self._holders[symbol].remove(holder)
                if holder[1] in self._connections:
                    self._connections.pop(holder[1]).close()
                continue
            if part is not None:
                return part
        return None

    def _fetch_from(self, holder: tuple[str, str], symbol: int, first: int, cells: int) -> memoryview | None:
        rebuild, (position, address) = self._rebuild, holder
        parity = symbol >= self._geometry.data_chunks
        node = rebuild.group.index(position)
        index = symbol - self._geometry.data_chunks if parity else self._chunk_of(node)
        if address not in self._connections:
            self._connections[address] = Connection.open(address, rebuild.timeout_s)
        connection = self._connections[address]
        request = rebuild._request(
            position=position,
            parity=parity,
            index=index,
            first_cell=first,
            cells=cells,
            chunk_bytes=self._chunk_bytes,
        )
        answer = connection.request(request)
        buffer = memoryview(bytearray(cells * CELL_BYTES))
        if answer.payload_bytes != len(buffer):
            raise CorruptImage("cells of another length", f"{answer.payload_bytes} for {len(buffer)} bytes")
        connection.receive_into(buffer)
        with rebuild._lock:
            rebuild.received_bytes += len(buffer)
        digests = answer.cells.digests if parity else self._data_digests(position, index, first, cells)
        if wrong := mismatches(buffer, digests):
            log.warning("node %s sent %d wrong cells of stripe %d", position, len(wrong), self.index)
            return None
        return buffer

    def _chunk_of(self, node: int) -> int:
        chunks = range(self._geometry.data_chunks)
        return next(c for c in chunks if self._geometry.stripe_of(node, c) == self.index)

    def _data_digests(self, position: str, chunk: int, first: int, cells: int) -> bytes:
        """Digests of a data symbol's cells; beyond the node's image they are those of zeros."""
        digests = node_digests(self._rebuild.seals[position])
        start = chunk * self._chunk_bytes // CELL_BYTES + first
        known = digests[start * DIGEST_BYTES : (start + cells) * DIGEST_BYTES]
        return known + ZERO_DIGEST * (cells - len(known) // DIGEST_BYTES)
