"""The sending side of protection: one data chunk, offered and sent to one holder of its parity.

Runs on a peer's thread.  What travels follows from the seal records (`ckptd.memory.change`);
bytes go out as they lie in the arena, but for differences, which are made in scratch memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckptd.errors import CkptdError, CorruptImage
from ckptd.failpoints import failpoint
from ckptd.image.digest import CELL_BYTES, cell_digests, mismatches
from ckptd.memory.bulk import Connection
from ckptd.memory.change import Run, can_be_base, digest_table, pieces, stripe_map
from ckptd.memory.holding import Holding, chunk_cells
from ckptd.memory.pace import Pace
from ckptd.v1 import bulk_pb2, common_pb2

# Cells of one frame, 16 MiB: a frame costs little beside its bytes, and giving up is soon.
FRAME_CELLS = 256
# As long as a training job lives, differences are rare enough for small pieces.
_DELTA_CELLS = 16


@dataclass(frozen=True)
class Chunk:
    """One chunk of this node's image of one step, on its way to one peer.

    Args:
        base_at: this node's holding of an older step of the same generation, or None.
        wanted: whether anybody still waits for it.
    """

    header: common_pb2.Header
    sender: str
    holding: Holding
    stripe: int
    chunk: int
    base_at: Callable[[int], Holding | None]
    wanted: Callable[[], bool]
    pace: Pace

    def send(self, connection: Connection) -> None:
        """Offers the chunk, sends what the peer's terms ask for, and waits until it is folded.

        Raises:
            CorruptImage: this node's own bytes are damaged, or the terms cannot be met; the peer
                was told that this contribution is given up.
            Refusal, Unreachable, DeadlineExceeded: it did not get there.
        """
        offer = bulk_pb2.Offer(
            step=self.holding.step, stripe=self.stripe, chunk=self.chunk, chunk_bytes=self.holding.chunk_bytes
        )
        terms = connection.request(self._frame(offer=offer)).terms
        if not terms.wanted:
            return
        try:
            for contribution, payload in self._frames(terms):
                if not self.wanted():
                    connection.send(self._frame(contribution=bulk_pb2.Contribution(given_up=True)))
                    return
                self.pace.take(sum(view.nbytes for view in payload))
                connection.send(self._frame(contribution=contribution), payload)
                failpoint("daemon.sending")
            connection.answer()
        except CorruptImage:
            connection.send(self._frame(contribution=bulk_pb2.Contribution(given_up=True)))
            raise
        except CkptdError:
            # Cells that go as they lie are first looked at by the peer, who refuses damaged ones
            # however often they are sent.
            self._refuse_damage()
            raise

    def _refuse_damage(self) -> None:
        """Raises CorruptImage where this chunk is not what was sealed."""
        holding = self.holding
        first, count = chunk_cells(holding.seals[holding.position], self.chunk, holding.chunk_bytes)
        table = digest_table(holding.seals[holding.position])
        for view in holding.data_cells(first, count):
            cells = len(view) // CELL_BYTES
            if wrong := mismatches(view, table[first : first + cells].tobytes()):
                raise CorruptImage(
                    f"a cell of step {holding.step} is damaged on {self.sender}", f"cell {first + wrong[0]}"
                )
            first += cells

    def _frame(self, **body: object) -> bulk_pb2.BulkHeader:
        return bulk_pb2.BulkHeader(header=self.header, sender=self.sender, **body)  # type: ignore[arg-type]

    def _frames(self, terms: bulk_pb2.Terms) -> Iterator[tuple[bulk_pb2.Contribution, list[memoryview]]]:
        base = self.base_at(terms.base_step) if terms.has_base else None
        runs, holding = self._runs(terms, base), self.holding
        # Of this chunk, in the node's image.
        start, _ = chunk_cells(holding.seals[holding.position], self.chunk, holding.chunk_bytes)
        at, end = terms.first, runs[-1].end if runs else 0
        if at >= end:
            yield bulk_pb2.Contribution(first=at, final=True), []
        while at < end:
            some = pieces(runs, at, min(at + FRAME_CELLS, end), FRAME_CELLS)
            raw, alike = next(itertools.groupby(some, key=lambda run: run.raw))
            first, frame = at, list(alike)
            if raw:
                at, views, digests = frame[-1].end, self._as_they_lie(start, frame), b""
            else:
                assert base is not None
                cells = [start + cell for run in frame for cell in run.cells][:_DELTA_CELLS]
                at, (views, digests) = at + len(cells), self._differences(base, cells)
            yield bulk_pb2.Contribution(first=first, final=at == end, delta=not raw, digests=digests), views

    def _runs(self, terms: bulk_pb2.Terms, base: Holding | None) -> list[Run]:
        """The cells that travel, if both ends derive the same map of their stripe."""
        holding = self.holding
        if terms.has_base and (base is None or not can_be_base(holding, base)):
            raise CorruptImage(
                f"step {terms.base_step} is no base for step {holding.step}",
                f"{self.sender} does not hold it",
            )
        of_map = stripe_map(
            holding.geometry,
            holding.group,
            self.stripe,
            holding.seals,
            base.seals if base is not None else None,
            holding.chunk_bytes,
        )
        if of_map.digest != terms.map_digest:
            raise CorruptImage(
                f"the cells of stripe {self.stripe} of step {holding.step} are not agreed upon",
                f"{self.sender} and the holder of the parity have different seal records",
            )
        symbol = holding.geometry.symbol_on(holding.index, self.stripe)
        return of_map.runs(symbol)

    def _as_they_lie(self, start: int, frame: Sequence[Run]) -> list[memoryview]:
        views: list[memoryview] = []
        for run in frame:
            views += self.holding.data_cells(start + run.cells.start, len(run.cells))
        return views

    def _differences(self, base: Holding, cells: Sequence[int]) -> tuple[list[memoryview], bytes]:
        """old xor new of these cells, and the digests of that; both sides are verified on the way.

        Args:
            cells: of the node's image.
        """
        out = np.empty((len(cells), CELL_BYTES), np.uint8)
        for holding in (self.holding, base):
            table = digest_table(holding.seals[holding.position])
            for row, cell in enumerate(cells):
                (view,) = holding.data_cells(cell, 1)
                if mismatches(view, table[cell].tobytes()):
                    raise CorruptImage(
                        f"a cell of step {holding.step} is damaged on {self.sender}", f"cell {cell}"
                    )
                new = np.frombuffer(view, np.uint8)
                if holding is base:
                    out[row] ^= new
                else:
                    out[row] = new
        flat = out.reshape(-1).data
        return [flat], cell_digests(flat)
