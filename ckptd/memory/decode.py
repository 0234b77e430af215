"""The survivor's part of a recovery: decoding a share of a lost chunk for the replacement.

It verifies nothing: the replacement has the seal record, and compares what comes in.  A look
here would find nothing that the look there does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ckptd.erasure import Code
from ckptd.errors import CorruptImage, NotEnoughCells
from ckptd.image.digest import CELL_BYTES
from ckptd.memory.bulk import BLOCK_CELLS, Connection
from ckptd.memory.holding import Holding
from ckptd.memory.scratch import blocks
from ckptd.v1 import bulk_pb2, common_pb2


@dataclass
class Decoder:
    """Decodes cells of one chunk of a lost position.

    Args:
        header, sender: of requests to other survivors.
        holding: this node's, of the step; sealed.
        order: what is asked for.
        own: views of this node's symbol of a stripe: (stripe, first cell, cells).
    """

    header: common_pb2.Header
    sender: str
    holding: Holding
    order: bulk_pb2.Decode
    own: Callable[[int, int, int], Sequence[memoryview]]
    timeout_s: float

    def blocks(self) -> Iterator[memoryview]:
        """The lost cells in order, not verified; each block is valid until the next.

        Raises:
            NotEnoughCells: too few survivors hold a symbol of the stripe.
            CorruptImage: a survivor sent something else than what was asked for.
            Refusal, Unreachable, DeadlineExceeded: another survivor gives nothing.
        """
        order, holding = self.order, self.holding
        geometry = holding.geometry
        lost = holding.group.index(order.lost)
        stripe = geometry.stripe_of(lost, order.chunk)
        mine = geometry.symbol_on(holding.index, stripe)
        code = Code(geometry.data_chunks, geometry.parity)
        out = blocks(geometry.data_chunks)[-1]
        sources = self._sources(stripe, mine)
        try:
            for first, count in self._pieces():
                present = {symbol: source.next(count) for symbol, source in sources.items()}
                present[mine] = _joined(self.own(stripe, first, count))
                cells = out[: count * CELL_BYTES]
                code.decode(present, {geometry.symbol_on(lost, stripe): cells})
                yield cells
        finally:
            for source in sources.values():
                source.connection.close()

    def _pieces(self) -> list[tuple[int, int]]:
        begin, end = self.order.first_cell, self.order.first_cell + self.order.cells
        return [(at, min(BLOCK_CELLS, end - at)) for at in range(begin, end, BLOCK_CELLS)]

    def _sources(self, stripe: int, mine: int) -> dict[int, _Source]:
        """k-1 other symbols of the stripe, and their holders; the nearest in the group's order first."""
        geometry, group = self.holding.geometry, self.holding.group
        there = {s.position: s.bulk_address for s in self.order.survivors if s.position in group}
        nodes = [(self.holding.index + i) % len(group) for i in range(1, len(group))]
        nodes = [n for n in nodes if group[n] in there and group[n] != self.order.lost]
        needed = geometry.data_chunks - 1
        if len(nodes) < needed:
            raise NotEnoughCells(
                f"stripe {stripe} of step {self.order.step} cannot be decoded",
                f"{needed + 1} symbols needed, {len(nodes) + 1} there",
            )
        out: dict[int, _Source] = {}
        buffers = blocks(geometry.data_chunks)
        for node in nodes[:needed]:
            symbol = geometry.symbol_on(node, stripe)
            connection = Connection.open(there[group[node]], self.timeout_s)
            connection.send(self._fetch(node, symbol))
            out[symbol] = _Source(connection, buffers[len(out)])
        return out

    def _fetch(self, node: int, symbol: int) -> bulk_pb2.BulkHeader:
        geometry, order = self.holding.geometry, self.order
        parity = symbol >= geometry.data_chunks
        fetch = bulk_pb2.Fetch(
            snapshot_generation=order.snapshot_generation,
            step=order.step,
            position=self.holding.group[node],
            parity=parity,
            index=symbol - geometry.data_chunks if parity else symbol,
            first_cell=order.first_cell,
            cells=order.cells,
            chunk_bytes=order.chunk_bytes,
        )
        return bulk_pb2.BulkHeader(header=self.header, sender=self.sender, fetch=fetch)


class _Source:
    """One other survivor's symbol, piece after piece; what it sends ahead waits in the socket."""

    def __init__(self, connection: Connection, buffer: memoryview) -> None:
        self.connection = connection
        self._buffer = buffer

    def next(self, count: int) -> memoryview:
        """The next `count` cells; valid until the next call."""
        answer = self.connection.answer()
        if answer.payload_bytes != count * CELL_BYTES:
            raise CorruptImage("cells of another length", f"{answer.payload_bytes} bytes for {count} cells")
        view = self._buffer[: count * CELL_BYTES]
        self.connection.receive_into(view)
        return view


def _joined(views: Sequence[memoryview]) -> memoryview:
    """One view of these bytes; copied only where they do not lie together."""
    return views[0] if len(views) == 1 else memoryview(b"".join(views))
