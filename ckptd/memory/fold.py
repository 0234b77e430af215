"""Folding: a node's parity of one step, accumulated from its group's data chunks.

Parity is never changed in place: a fold starts from zeros in a slot of its own,
takes every cell once, and counts only when all contributions are in and its
digests are known.  A fold that is cancelled leaves nothing behind.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ckptd.erasure import Code
from ckptd.erasure.stripe import Geometry
from ckptd.image.digest import CELL_BYTES, cell_digests

_ZEROS = bytes(CELL_BYTES)


class Fold:
    """Accumulates this node's parity chunks; safe to feed from one thread per sender.

    Args:
        geometry: of the group.
        node: this node's index in the group.
        chunks: m writable buffers of `chunk_bytes`; they are zeroed by the first thread that adds.
    """

    def __init__(self, geometry: Geometry, node: int, chunks: Sequence[memoryview]) -> None:
        self._geometry = geometry
        self._code = Code(geometry.data_chunks, geometry.parity)
        self._chunks = list(chunks)
        # Parity p lies here for exactly one stripe; several senders feed it.
        self._index_of = {geometry.parity_stripe(node, p): p for p in range(geometry.parity)}
        self._locks = [threading.Lock() for _ in chunks]
        # Invariant: a contribution is in `_done` only when all its cells are folded.
        self._done: set[tuple[int, int]] = set()
        self._expected = {
            (stripe, geometry.data_source(stripe, symbol)[0])
            for stripe in self._index_of
            for symbol in range(geometry.data_chunks)
        }
        self._next_cell: dict[tuple[int, int], int] = {}
        self._cancelled = False
        # Zeroing a large chunk takes a while, so it is left to the bulk threads.
        self._zeroed = [False] * len(self._chunks)

    @property
    def complete(self) -> bool:
        """Whether every contribution has been folded."""
        return self._done == self._expected

    @property
    def missing(self) -> list[tuple[int, int]]:
        """(stripe, node) of contributions that are still awaited."""
        return sorted(self._expected - self._done)

    def add(self, stripe: int, node: int, chunk: int, first_cell: int, cells: memoryview) -> None:
        """Folds verified cells of `node`'s `chunk`, in order, each exactly once.

        Raises:
            ValueError: not a contribution that this node awaits, or out of order, or given up.
        """
        key, p = (stripe, node), self._index_of.get(stripe)
        if p is None or key not in self._expected or self._geometry.stripe_of(node, chunk) != stripe:
            raise ValueError(f"stripe {stripe} chunk {chunk} of node {node} is not awaited here")
        count = len(cells) // CELL_BYTES
        if len(cells) % CELL_BYTES:
            raise ValueError(f"{len(cells)} bytes are no whole cells")
        # A sender that lost its connection sends again while its old frames are still being
        # read here: whose turn it is can only be said under the lock.
        with self._locks[p]:
            due = self._next_cell.get(key, 0)
            if self._cancelled:
                raise ValueError("this fold was given up")
            if first_cell + count <= due:
                return  # sent again after a broken connection
            if key in self._done or first_cell > due:
                raise ValueError(f"cell {first_cell} of {key} comes out of turn, expected {due}")
            parity = self._chunks[p][due * CELL_BYTES : (first_cell + count) * CELL_BYTES]
            new = cells[(due - first_cell) * CELL_BYTES :]
            if len(parity) != len(new):
                raise ValueError(
                    f"cells up to {first_cell + count} in a chunk of {len(self._chunks[p])} bytes"
                )
            self._zero(p)
            self._code.update_one(self._geometry.symbol_on(node, stripe), p, new, parity)
            self._next_cell[key] = first_cell + count

    def finish(self, stripe: int, node: int, cells: int) -> bool:
        """Ticks a contribution of `cells` cells off; returns whether the fold is complete now.

        Raises:
            ValueError: it is not awaited here, or has another number of cells so far.
        """
        key = (stripe, node)
        if key not in self._expected or self._next_cell.get(key, 0) != cells:
            raise ValueError(f"{key} ends after {self._next_cell.get(key, 0)} cells, expected {cells}")
        self._done.add(key)
        return self.complete

    def digests(self) -> list[bytes]:
        """Cell digests of each finished chunk; without meaning once the fold was given up."""
        assert self.complete
        for p, lock in enumerate(self._locks):
            with lock:
                if not self._cancelled:  # else the chunk may be another step's already
                    self._zero(p)
        return [cell_digests(chunk) for chunk in self._chunks]

    def _zero(self, p: int) -> None:
        if not self._zeroed[p]:
            chunk = self._chunks[p]
            for start in range(0, len(chunk), CELL_BYTES):
                chunk[start : start + CELL_BYTES] = _ZEROS[: len(chunk) - start]
            self._zeroed[p] = True

    def cancel(self) -> None:
        """No cell is folded after this returns, so the slot may be given to another step."""
        self._cancelled = True
        for lock in self._locks:
            with lock:
                pass
