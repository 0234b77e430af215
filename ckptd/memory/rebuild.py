"""Rebuilding a lost node's image from the living members of its group.

A wrong cell is an erased cell: what does not match its digest is left out, and
another symbol takes its place as long as there is one.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from ckptd.erasure import Code
from ckptd.erasure.stripe import Geometry
from ckptd.errors import CkptdError, CorruptImage, NotEnoughCells
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES, cell_digests, mismatches
from ckptd.memory.bulk import BLOCK_CELLS, Connection, Refusal
from ckptd.memory.holding import chunk_cells, node_bytes, node_digests, seal_fault
from ckptd.v1 import bulk_pb2, common_pb2

log = logging.getLogger("ckptd.rebuild")

ZERO_DIGEST = cell_digests(bytes(CELL_BYTES))


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

    def count(self, nbytes: int) -> None:
        """Counts bytes that came in; from any thread."""
        with self._lock:
            self.received_bytes += nbytes

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

    @property
    def geometry(self) -> Geometry:
        return Geometry(len(self.group), self.parity)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of every chunk of the group; after `fetch_seals`."""
        return self.geometry.chunk_bytes(max(node_bytes(seal) for seal in self.seals.values()))

    def cells(self, chunk: int, first: int, count: int) -> memoryview:
        """Verified cells first.. of a chunk of the position's image, all of them inside the image.

        Raises:
            NotEnoughCells: with how many symbols were needed and found, and who holds what.
        """
        lost = self.group.index(self.position)
        stripe = self.geometry.stripe_of(lost, chunk)
        at = chunk_cells(self.seals[self.position], chunk, self.chunk_bytes)[0] + first
        expected = node_digests(self.seals[self.position])[at * DIGEST_BYTES : (at + count) * DIGEST_BYTES]
        return self._decoded(stripe, chunk, first, count, expected)

    def parity_cells(self, p: int, first: int, count: int, expected: bytes) -> memoryview:
        """Cells first.. of the position's parity chunk `p`, which must have the digests `expected`.

        Raises:
            NotEnoughCells: as `cells`.
        """
        stripe = self.geometry.parity_stripe(self.group.index(self.position), p)
        return self._decoded(stripe, self.geometry.data_chunks + p, first, count, expected)

    def _decoded(self, stripe: int, symbol: int, first: int, count: int, expected: bytes) -> memoryview:
        one = _Stripe(self, self.geometry, stripe, self.chunk_bytes)
        try:
            out = bytearray()
            for at in range(0, count, BLOCK_CELLS):
                some = min(BLOCK_CELLS, count - at)
                digests = expected[at * DIGEST_BYTES : (at + some) * DIGEST_BYTES]
                out += one.decode(symbol, first + at, some, digests)
            return memoryview(out)
        finally:
            one.close()

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
        self._faults: dict[str, str] = {}  # why a position's symbol is of no use
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
        raise NotEnoughCells(
            f"cells {first} to {first + cells - 1} of stripe {self.index} of step"
            f" {self._rebuild.snapshot[1]} cannot be decoded",
            f"{needed} good symbols needed, {len(present)} found: {self._account(present)}",
        )

    def _account(self, present: Mapping[int, memoryview]) -> str:
        """Which position holds which symbol of this stripe, and what is wrong with it."""
        rebuild, geometry = self._rebuild, self._geometry
        words = []
        for node, position in enumerate(rebuild.group):
            symbol = geometry.symbol_on(node, self.index)
            known = symbol in present
            fault = "good" if known else self._faults.get(position, "lost")
            kind = (
                f"parity {symbol - geometry.data_chunks}"
                if symbol >= geometry.data_chunks
                else f"data {symbol}"
            )
            words.append(f"{position} holds {kind} ({fault})")
        return ", ".join(words)

    def _fetch(self, symbol: int, first: int, cells: int) -> memoryview | None:
        """Verified cells of one symbol, or None; who cannot give any is not asked again."""
        for holder in list(self._holders.get(symbol, ())):
            try:
                part = self._fetch_from(holder, symbol, first, cells)
            except (CkptdError, ValueError) as error:
                log.warning("symbol %d of stripe %d from %s: %s", symbol, self.index, holder[0], error)
                self._faults[holder[0]] = f"refused: {error}" if isinstance(error, Refusal) else "unreachable"
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
        rebuild.count(len(buffer))
        digests = answer.cells.digests if parity else self._data_digests(position, index, first, cells)
        if wrong := mismatches(buffer, digests):
            log.warning("node %s sent %d wrong cells of stripe %d", position, len(wrong), self.index)
            self._faults[position] = f"{len(wrong)} wrong cells"
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
