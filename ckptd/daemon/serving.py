"""What peers fetch from this node when they rebuild a lost image: seal records and cells.

Runs on the threads of the bulk plane; looks things up on the event loop.
"""

from __future__ import annotations

from ckptd.daemon.bridge import Bridge
from ckptd.daemon.settings import DaemonSettings
from ckptd.errors import InvalidRequest, NotFound
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES
from ckptd.memory.bulk import BLOCK_CELLS, Connection, message
from ckptd.memory.decode import Decoder
from ckptd.memory.holding import Holding
from ckptd.v1 import bulk_pb2

# A length on the wire is checked before it is worked with: a share of 255 nodes with 16 TiB each.
MAX_CHUNK_BYTES = 16 << 40


class Serving:
    """Serves the symbols that this node holds."""

    def __init__(self, settings: DaemonSettings, bridge: Bridge) -> None:
        self._settings = settings
        self._bridge = bridge

    def fetch(self, connection: Connection, frame: bulk_pb2.BulkHeader) -> None:
        """Answers one Fetch frame.

        Raises:
            CkptdError: sent to the peer as a refusal.
        """
        fetch = frame.fetch
        if fetch.seal_record:
            text = self._bridge.on_loop(self._seal_text(frame))
            connection.send(bulk_pb2.BulkHeader(cells=bulk_pb2.Cells()), message(text))
            return
        holding = self._bridge.on_loop(self._fetched(frame))
        # A slot that is reused meanwhile sends wrong bytes; the digests tell.
        for first in range(fetch.first_cell, fetch.first_cell + fetch.cells, BLOCK_CELLS):
            count = min(BLOCK_CELLS, fetch.first_cell + fetch.cells - first)
            views, digests = _symbol(holding, fetch, first, count)
            connection.send(bulk_pb2.BulkHeader(cells=bulk_pb2.Cells(digests=digests)), views)

    def decode(self, connection: Connection, frame: bulk_pb2.BulkHeader) -> None:
        """Decodes a share of a lost chunk together with other survivors, and sends it.

        Raises:
            CkptdError: sent to the peer as a refusal.
        """
        order = frame.decode
        holding = self._bridge.on_loop(self._holding_of(frame))
        geometry = holding.geometry
        cells = order.chunk_bytes // CELL_BYTES
        inside = order.first_cell + order.cells <= cells and order.cells > 0
        if order.lost not in holding.group or order.lost == holding.position or not inside:
            raise InvalidRequest(
                f"cells of {order.lost} cannot be decoded here",
                f"{order.cells} from cell {order.first_cell} on, of {cells}",
            )
        if not 0 <= order.chunk < geometry.data_chunks or order.chunk_bytes != holding.chunk_bytes:
            raise InvalidRequest(
                f"chunk {order.chunk} of {order.chunk_bytes:,} bytes is not one of this step"
            )
        decoder = Decoder(
            header=frame.header,
            sender=self._settings.node,
            holding=holding,
            order=order,
            own=lambda stripe, first, count: _own_symbol(holding, stripe, first, count),
            timeout_s=self._settings.bulk_timeout_s,
        )
        for view in decoder.blocks():
            connection.send(bulk_pb2.BulkHeader(cells=bulk_pb2.Cells()), [view])

    async def _holding_of(self, frame: bulk_pb2.BulkHeader) -> Holding:
        order = frame.decode
        holding = self._bridge.job_of(frame).memory.holding_at(order.snapshot_generation, order.step)
        if not holding.sealed or set(holding.seals) != set(holding.group) or not holding.protected_group:
            raise NotFound(f"step {order.step} is not sealed by the whole group on {self._settings.node}")
        return holding

    async def _seal_text(self, frame: bulk_pb2.BulkHeader) -> bytes:
        fetch = frame.fetch
        holding = self._bridge.job_of(frame).memory.holding_at(fetch.snapshot_generation, fetch.step)
        if fetch.position not in holding.seals:
            raise NotFound(f"node {self._settings.node} has no seal record of {fetch.position}")
        return holding.seals[fetch.position].SerializeToString()

    async def _fetched(self, frame: bulk_pb2.BulkHeader) -> Holding:
        """The holding that can give what is asked for."""
        fetch, node = frame.fetch, self._settings.node
        holding = self._bridge.job_of(frame).memory.holding_at(fetch.snapshot_generation, fetch.step)
        if holding.position != fetch.position:
            raise NotFound(f"node {node} stands for {holding.position}, not {fetch.position}")
        end = fetch.first_cell + fetch.cells
        if fetch.cells == 0 or end * CELL_BYTES > max(fetch.chunk_bytes, BLOCK_CELLS * CELL_BYTES):
            raise InvalidRequest(
                f"{fetch.cells} cells from {fetch.first_cell} on asked for",
                f"a chunk has {fetch.chunk_bytes:,} bytes",
            )
        if fetch.chunk_bytes > MAX_CHUNK_BYTES:
            raise InvalidRequest(f"chunks of {fetch.chunk_bytes:,} bytes", f"at most {MAX_CHUNK_BYTES:,}")
        if not fetch.parity:
            if not holding.sealed:
                raise NotFound(f"the image of step {fetch.step} is not sealed on {node}")
            return holding
        parity = holding.parity
        if parity is None or not holding.folded or fetch.index >= len(parity.chunks):
            raise NotFound(f"the parity of step {fetch.step} is not folded on {node}")
        if parity.chunk_bytes != fetch.chunk_bytes or end * CELL_BYTES > parity.chunk_bytes:
            raise InvalidRequest(f"cells up to {end} of a chunk of {parity.chunk_bytes:,} bytes")
        return holding


def _symbol(
    holding: Holding, fetch: bulk_pb2.Fetch, first: int, count: int
) -> tuple[list[memoryview], bytes]:
    """Views of the cells asked for; of parity also their digests."""
    if not fetch.parity:
        return holding.data_cells(fetch.index * fetch.chunk_bytes // CELL_BYTES + first, count), b""
    parity = holding.parity
    if parity is None or not parity.digests:
        raise NotFound(f"the parity of step {fetch.step} was given up")
    view = parity.chunks[fetch.index][first * CELL_BYTES : (first + count) * CELL_BYTES]
    digests = parity.digests[fetch.index][first * DIGEST_BYTES : (first + count) * DIGEST_BYTES]
    return [view], digests


def _own_symbol(holding: Holding, stripe: int, first: int, count: int) -> list[memoryview]:
    """This node's symbol of a stripe: cells of its image, or of its folded parity.

    Raises:
        NotFound: it should be parity, and that is not folded.
    """
    geometry = holding.geometry
    symbol = geometry.symbol_on(holding.index, stripe)
    if symbol < geometry.data_chunks:
        return holding.data_cells(symbol * holding.chunk_bytes // CELL_BYTES + first, count)
    if holding.parity is None or not holding.folded:
        raise NotFound(f"the parity of step {holding.step} is not folded on {holding.position}")
    chunk = holding.parity.chunks[symbol - geometry.data_chunks]
    return [chunk[first * CELL_BYTES : (first + count) * CELL_BYTES]]
