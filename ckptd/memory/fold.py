"""Folding: a node's parity of one step, accumulated from its group's data chunks.

Parity is never changed in place: a fold has a slot of its own, where every cell starts
from zeros or from a copy of the base's cell, takes each contribution once, and is
digested when its last one is in, while its bytes are still in the processor's cache.
Where a cell starts from zeros and the code's coefficient is 1, the first contribution is
received where the parity lies: nothing is copied.
A fold counts only when it is complete; one that is cancelled leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptd.erasure import Code
from ckptd.erasure.stripe import Geometry
from ckptd.errors import CorruptImage
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES, cell_digests, mismatches
from ckptd.memory.change import StripeMap

_TAIL_CELLS = 16  # cells that nobody sends are made in pieces, so that a cancel waits for one piece only
_ZEROS = bytes(_TAIL_CELLS * CELL_BYTES)
_ZERO_DIGEST = cell_digests(bytes(CELL_BYTES))

Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Base:
    """The older step's parity that delta cells start from."""

    step: int
    chunks: Sequence[memoryview]
    digests: Sequence[bytes]


class Fold:
    """Accumulates this node's parity chunks; safe to feed from one thread per sender.

    Args:
        geometry: of the group.
        node: this node's index in the group.
        chunks: m writable buffers of `chunk_bytes`; what they hold is not looked at.
        maps: of the stripe of each chunk.
        base: where cells that are not raw start from; None where all are raw.
    """

    def __init__(
        self,
        geometry: Geometry,
        node: int,
        chunks: Sequence[memoryview],
        maps: Sequence[StripeMap],
        base: Base | None = None,
    ) -> None:
        assert base is not None or all(m.raw.all() for m in maps)
        self.base = base
        self._geometry = geometry
        code = Code(geometry.data_chunks, geometry.parity)
        # Parity p lies here for exactly one stripe; several senders feed it.
        self._stripes = [geometry.parity_stripe(node, p) for p in range(geometry.parity)]
        self._parities = [
            _Parity(p, code, chunk, stripe_map, base)
            for p, (chunk, stripe_map) in enumerate(zip(chunks, maps, strict=True))
        ]
        self._expected = {
            (stripe, geometry.data_source(stripe, symbol)[0])
            for stripe in self._stripes
            for symbol in range(geometry.data_chunks)
        }
        # Invariant: a contribution is in `_done` only when all its cells are folded.
        self._done: set[tuple[int, int]] = set()
        self._next: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()  # of `_done`
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether this fold was given up."""
        return self._cancelled

    @property
    def complete(self) -> bool:
        """Whether every contribution has been folded."""
        return self._done == self._expected

    def map_of(self, stripe: int) -> StripeMap:
        """Which cells of this stripe travel.

        Raises:
            ValueError: its parity does not lie here.
        """
        return self._parity_of(stripe).map

    def done(self, stripe: int, node: int) -> bool:
        """Whether this contribution has been folded."""
        return (stripe, node) in self._done

    def next_of(self, stripe: int, node: int) -> int:
        """How many of the cells that `node` sends to this stripe have been folded."""
        return self._next.get((stripe, node), 0)

    @contextlib.contextmanager
    def taking(
        self, stripe: int, node: int, first: int, cells: Indices, digests: bytes, scratch: memoryview
    ) -> Iterator[memoryview]:
        """Where to receive cells of `node`; on leaving without an error they are folded, each exactly once.

        The caller fills the buffer and verifies it before it leaves; with an error, nothing counts.

        Args:
            first: position of the first one in the list of cells that this node sends.
            cells: their ascending indices in the chunk.
            digests: of the cells as they travel, 16 bytes each.
            scratch: room for them, where they cannot be received in place.

        Raises:
            ValueError: not a contribution that this node awaits, out of order, or given up.
            CorruptImage: the base's parity is damaged.
        """
        key, parity = (stripe, node), self._parity_of(stripe)
        if key not in self._expected:
            raise ValueError(f"stripe {stripe} of node {node} is not awaited here")
        symbol = self._geometry.symbol_on(node, stripe)
        with parity.lock:
            place = parity.reserve(symbol, cells) if self._turn(key, first) == first else None
        if place is None:
            payload = scratch[: len(cells) * CELL_BYTES]
            yield payload
            self._add(key, first, cells, payload)
            return
        landed = False
        try:
            yield parity.view(place)
            landed = True
        finally:
            with parity.lock:
                # Whoever comes second with the same cells has waited for this one.
                parity.land(place, digests if landed and not self._cancelled else None)
                if landed and not self._cancelled:
                    self._next[key] = first + len(cells)

    def _add(self, key: tuple[int, int], first: int, cells: Indices, payload: memoryview) -> None:
        stripe, node = key
        parity = self._parity_of(stripe)
        # A sender that lost its connection sends again while its old frames are still being
        # read here: whose turn it is can only be said under the lock.
        with parity.lock:
            again = self._turn(key, first) - first
            if again < len(cells):
                parity.await_landing(cells[again:])
                # Meanwhile another thread may have brought the same.
                again = self._turn(key, first) - first
            if again < len(cells):
                symbol = self._geometry.symbol_on(node, stripe)
                parity.take(symbol, cells[again:], payload[again * CELL_BYTES :])
                self._next[key] = first + len(cells)

    def _turn(self, key: tuple[int, int], first: int) -> int:
        """The position that is due; under the lock."""
        due = self._next.get(key, 0)
        if self._cancelled:
            raise ValueError("this fold was given up")
        if first > due:
            raise ValueError(f"cell {first} of {key} comes out of turn, expected {due}")
        return due

    def finish(self, stripe: int, node: int) -> bool:
        """Ticks a contribution off; returns whether the fold became complete by this call.

        Raises:
            ValueError: it is not awaited here, or not all its cells have come.
        """
        key, parity = (stripe, node), self._parity_of(stripe)
        symbol = self._geometry.symbol_on(node, stripe)
        cells = int(parity.map.sends[symbol].sum()) if key in self._expected else -1
        if self.next_of(stripe, node) != cells:
            raise ValueError(f"{key} ends after {self.next_of(stripe, node)} cells, expected {cells}")
        with self._lock:
            already = key in self._done
            self._done.add(key)
            return self.complete and not already

    def digests(self) -> list[bytes]:
        """Makes the cells that nobody sends, and returns the cell digests of each chunk.

        Raises:
            CorruptImage: the base's parity is damaged.
        """
        assert self.complete
        return [parity.finish(lambda: self._cancelled) for parity in self._parities]

    def cancel(self) -> None:
        """Nothing is begun any more; the slot may be given to another step once the fold is not `busy`."""
        self._cancelled = True
        for parity in self._parities:
            with parity.lock:
                parity.lock.notify_all()

    @property
    def busy(self) -> bool:
        """Whether bytes are being received where the parity lies."""
        return any(parity.landing for parity in self._parities)

    def _parity_of(self, stripe: int) -> _Parity:
        if stripe not in self._stripes:
            raise ValueError(f"no parity of stripe {stripe} lies here")
        return self._parities[self._stripes.index(stripe)]


class _Parity:
    """One parity chunk being made.  Invariant: a cell with no sender left is digested."""

    def __init__(
        self, index: int, code: Code, chunk: memoryview, stripe_map: StripeMap, base: Base | None
    ) -> None:
        self.map = stripe_map
        self.lock = threading.Condition()
        # Runs of cells that are being received in place.  Invariant: none of them is begun.
        self.landing: list[slice] = []
        self._index = index
        self._code = code
        self._chunk = chunk
        self._base = base
        self._senders_left = np.stack(stripe_map.sends).sum(axis=0, dtype=np.int16)
        self._begun = np.zeros(len(stripe_map.raw), np.bool_)
        self._digests = np.zeros((len(stripe_map.raw), DIGEST_BYTES), np.uint8)

    # The caller of these holds the lock.

    def view(self, run: slice) -> memoryview:
        """The bytes of these cells."""
        return self._chunk[run.start * CELL_BYTES : run.stop * CELL_BYTES]

    def reserve(self, symbol: int, cells: Indices) -> slice | None:
        """A run that may be received in place, as nothing is there yet and nothing has to be computed."""
        if not len(cells) or not self._code.is_one(symbol, self._index):
            return None
        run = slice(int(cells[0]), int(cells[-1]) + 1)
        fresh = run.stop - run.start == len(cells) and not self._begun[run].any() and self.map.raw[run].all()
        if not fresh or self._lands(run):
            return None
        self.landing.append(run)
        return run

    def land(self, run: slice, digests: bytes | None) -> None:
        """Ends a reservation: the run holds a whole contribution now, or, without digests, nothing."""
        self.landing.remove(run)
        if digests is not None:
            self._begun[run] = True
            self._senders_left[run] -= 1
            # What only one node sends is final, and has the digests of what came.
            self._digests[run] = _table(digests)
        self.lock.notify_all()

    def await_landing(self, cells: Indices) -> None:
        """Waits while others receive these cells in place; they end, or their deadline ends them."""
        run = slice(int(cells[0]), int(cells[-1]) + 1)
        self.lock.wait_for(lambda: not self._lands(run))

    def _lands(self, run: slice) -> bool:
        return any(other.start < run.stop and run.start < other.stop for other in self.landing)

    def take(self, symbol: int, cells: Indices, payload: memoryview) -> None:
        """Folds cells of one data symbol."""
        for at, run in _runs(cells, self._begun[cells], self.map.raw[cells]):
            view = self.view(run)
            part = payload[at * CELL_BYTES : at * CELL_BYTES + len(view)]
            if not self._begun[run.start] and self.map.raw[run.start]:
                self._code.begin_one(symbol, self._index, part, view)
            else:
                if not self._begun[run.start]:
                    self._copy_base(run)
                self._code.update_one(symbol, self._index, part, view)
            self._begun[run] = True
            self._senders_left[run] -= 1
            self._digest_last(run)

    def _digest_last(self, run: slice) -> None:
        """Digests the cells of `run` that no sender is left for."""
        if not self._senders_left[run].any():
            self._digests[run] = _table(cell_digests(self.view(run)))
            return
        for cell in np.flatnonzero(self._senders_left[run] == 0) + run.start:
            self._digests[cell] = _table(cell_digests(self.view(slice(cell, cell + 1))))

    def finish(self, cancelled: Callable[[], bool]) -> bytes:
        """Makes the cells that nobody sends; returns the digests of all."""
        for _, run in _runs(np.flatnonzero(~self._begun)):
            for start in range(run.start, run.stop, _TAIL_CELLS):
                piece = slice(start, min(start + _TAIL_CELLS, run.stop))
                with self.lock:
                    if cancelled():  # the slot may be another step's already
                        break
                    self._make_unsent(piece)
        return self._digests.tobytes()

    def _make_unsent(self, run: slice) -> None:
        if self._base is not None:
            self._copy_base(run)
            self._digests[run] = _table(self._base.digests[self._index])[run]
        else:
            view = self.view(run)
            view[:] = _ZEROS[: len(view)]
            self._digests[run] = np.frombuffer(_ZERO_DIGEST, np.uint8)

    def _copy_base(self, run: slice) -> None:
        base = self._base
        assert base is not None
        span = slice(run.start * CELL_BYTES, run.stop * CELL_BYTES)
        target = self.view(run)
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(base.chunks[self._index][span], np.uint8))
        digests = base.digests[self._index][run.start * DIGEST_BYTES : run.stop * DIGEST_BYTES]
        if wrong := mismatches(target, digests):
            raise CorruptImage(
                f"parity of step {base.step} is damaged", f"{len(wrong)} cells from cell {run.start} on"
            )


def _runs(cells: Indices, *states: NDArray[np.bool_]) -> Iterator[tuple[int, slice]]:
    """(position, run): ascending cells cut into runs of neighbours with equal states."""
    if not len(cells):
        return
    whole = int(cells[-1]) - int(cells[0]) + 1 == len(cells)
    if whole and all(state.all() or not state.any() for state in states):  # nearly always
        yield 0, slice(int(cells[0]), int(cells[-1]) + 1)
        return
    breaks = np.diff(cells) != 1
    for state in states:
        breaks |= np.diff(state)
    starts = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(cells)]
    for begin, end in itertools.pairwise(starts):
        yield begin, slice(int(cells[begin]), int(cells[end - 1]) + 1)


def _table(digests: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)
