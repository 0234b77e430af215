"""Folding: a node's parity of one step, accumulated from its group's data chunks.

Parity is never changed in place: a fold has a slot of its own, where every cell starts
from zeros or from a copy of the base's cell, takes each contribution once, and is
digested when its last one is in, while its bytes are still in the processor's cache.
Where a cell starts from zeros and the code's coefficient is 1, the first contribution is
received where the parity lies: nothing is copied.
A fold counts only when it is complete; one that is cancelled leaves nothing behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckptd.erasure import Code
from ckptd.erasure.stripe import Geometry
from ckptd.errors import CorruptImage
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES, cell_digests, mismatches
from ckptd.memory.change import Run, StripeMap

_TAIL_CELLS = 16  # cells that nobody sends are made in pieces, so that a cancel waits for one piece only
_ZEROS = bytes(_TAIL_CELLS * CELL_BYTES)
_ZERO_DIGEST = cell_digests(bytes(CELL_BYTES))
_ONE_LESS = bytes([0, *range(255)])  # for `translate`


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
        self._parities: dict[int, _Parity] = {}
        # By stripe and node: the parity that it goes into, and the number of its data symbol.
        self._awaited: dict[tuple[int, int], tuple[_Parity, int]] = {}
        code = Code(geometry.data_chunks, geometry.parity)
        for p, (chunk, stripe_map) in enumerate(zip(chunks, maps, strict=True)):
            # Parity p lies here for exactly one stripe; several senders feed it.
            stripe = geometry.parity_stripe(node, p)
            self._parities[stripe] = parity = _Parity(p, code, chunk, stripe_map, base)
            for symbol in range(geometry.data_chunks):
                self._awaited[stripe, geometry.data_source(stripe, symbol)[0]] = parity, symbol
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
        return len(self._done) == len(self._awaited)

    def map_of(self, stripe: int) -> StripeMap:
        """Which cells of this stripe travel.

        Raises:
            ValueError: its parity does not lie here.
        """
        if stripe not in self._parities:
            raise ValueError(f"no parity of stripe {stripe} lies here")
        return self._parities[stripe].map

    def done(self, stripe: int, node: int) -> bool:
        """Whether this contribution has been folded."""
        return (stripe, node) in self._done

    def next_of(self, stripe: int, node: int) -> int:
        """How many of the cells that `node` sends to this stripe have been folded."""
        return self._next.get((stripe, node), 0)

    def take(
        self,
        stripe: int,
        node: int,
        run: Run,
        digests: bytes,
        scratch: memoryview,
        receive: Callable[[memoryview], None],
    ) -> None:
        """Receives cells of `node` and folds them, each exactly once.

        Args:
            run: which of the cells that this node sends; of this fold's map.
            digests: of the cells as they travel, 16 bytes each.
            scratch: room for them, where they cannot be received in place.
            receive: fills a buffer and verifies it; where it raises, nothing counts.

        Raises:
            ValueError: not a contribution that this node awaits, out of order, or given up;
                if that was before `receive`, it is not called.
            CorruptImage: the base's parity is damaged.
        """
        key, cells = (stripe, node), run.cells
        parity, symbol = self._find(key)
        with parity.lock:
            in_place = self._turn(key, run.first) == run.first and parity.reserve(symbol, cells)
        if not in_place:
            payload = scratch[: len(cells) * CELL_BYTES]
            receive(payload)
            self._add(key, run, payload)
            return
        landed = False
        try:
            receive(parity.view(cells))
            landed = True
        finally:
            with parity.lock:
                landed = landed and not self._cancelled
                # Whoever comes second with the same cells has waited for this one.
                parity.land(cells, digests if landed else None)
                if landed:
                    self._next[key] = run.first + len(cells)

    def _add(self, key: tuple[int, int], run: Run, payload: memoryview) -> None:
        parity, symbol = self._find(key)
        first, cells = run.first, run.cells
        # A sender that lost its connection sends again while its old frames are still being
        # read here: whose turn it is can only be said under the lock.
        with parity.lock:
            again = self._turn(key, first) - first
            if again < len(cells):
                parity.await_landing(cells[again:])
                # Meanwhile another thread may have brought the same.
                again = self._turn(key, first) - first
            if again < len(cells):
                parity.fold(symbol, cells[again:], payload[again * CELL_BYTES :])
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
        key = (stripe, node)
        parity, symbol = self._find(key)
        cells = int(parity.map.sends[symbol].sum())
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
        return [parity.finish(lambda: self._cancelled) for parity in self._parities.values()]

    def cancel(self) -> None:
        """Nothing is begun any more; the slot may be given to another step once the fold is not `busy`."""
        self._cancelled = True
        for parity in self._parities.values():
            with parity.lock:
                parity.landed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether bytes are being received where the parity lies."""
        return any(parity.landing for parity in self._parities.values())

    def _find(self, key: tuple[int, int]) -> tuple[_Parity, int]:
        if key not in self._awaited:
            raise ValueError(f"stripe {key[0]} of node {key[1]} is not awaited here")
        return self._awaited[key]


class _Parity:
    """One parity chunk being made.  Invariant: a cell with no sender left is digested.

    What is known of the cells lies in bytes, one per cell: arrays cost more than the work on the
    few cells that come at a time.
    """

    def __init__(
        self, index: int, code: Code, chunk: memoryview, stripe_map: StripeMap, base: Base | None
    ) -> None:
        self.map = stripe_map
        self.lock = threading.Lock()
        self.landed = threading.Condition(self.lock)
        # Runs of cells that are being received in place.  Invariant: none of them is begun.
        self.landing: list[range] = []
        self._index = index
        self._code = code
        self._chunk = chunk
        self._base = base
        self._plain = [code.is_one(symbol, index) for symbol in range(code.k)]
        self._raw = stripe_map.raw.tobytes()
        self._senders_left = bytearray(np.stack(stripe_map.sends).sum(axis=0, dtype=np.uint8).tobytes())
        self._begun = bytearray(len(self._raw))
        self._digests = bytearray(len(self._raw) * DIGEST_BYTES)

    # The caller of these holds the lock.

    def view(self, cells: range) -> memoryview:
        """The bytes of these cells."""
        return self._chunk[cells.start * CELL_BYTES : cells.stop * CELL_BYTES]

    def reserve(self, symbol: int, cells: range) -> bool:
        """Whether they may be received in place, as nothing is there yet and nothing has to be computed."""
        fresh = self._raw[cells.start] and 1 not in self._begun[cells.start : cells.stop]
        if not fresh or not self._plain[symbol] or self._lands(cells):
            return False
        self.landing.append(cells)
        return True

    def land(self, cells: range, digests: bytes | None) -> None:
        """Ends a reservation: the cells hold a whole contribution now, or, without digests, nothing."""
        self.landing.remove(cells)
        if digests is not None:
            self._count(cells)
            # What only one node sends is final, and has the digests of what came.
            self._set_digests(cells, digests)
        self.landed.notify_all()

    def await_landing(self, cells: range) -> None:
        """Waits while others receive these cells in place; they end, or their deadline ends them."""
        self.landed.wait_for(lambda: not self._lands(cells))

    def _lands(self, cells: range) -> bool:
        return any(other.start < cells.stop and cells.start < other.stop for other in self.landing)

    def fold(self, symbol: int, cells: range, payload: memoryview) -> None:
        """Folds cells of one data symbol, all of one mode."""
        for run in self._alike(cells):
            view, at = self.view(run), (run.start - cells.start) * CELL_BYTES
            part = payload[at : at + len(view)]
            if not self._begun[run.start] and self._raw[run.start]:
                self._code.begin_one(symbol, self._index, part, view)
            else:
                if not self._begun[run.start]:
                    self._copy_base(run)
                self._code.update_one(symbol, self._index, part, view)
            self._count(run)
            self._digest_last(run)

    def _alike(self, cells: range) -> Iterator[range]:
        """`cells`, cut where one is begun and the next one is not, or the other way round."""
        at = cells.start
        while at < cells.stop:
            end = self._begun.find(1 - self._begun[at], at, cells.stop)
            run = range(at, end if end >= 0 else cells.stop)
            yield run
            at = run.stop

    def _count(self, cells: range) -> None:
        """Notes that one sender's contribution is in them."""
        span = slice(cells.start, cells.stop)
        self._begun[span] = b"\1" * len(cells)
        self._senders_left[span] = self._senders_left[span].translate(_ONE_LESS)

    def _digest_last(self, cells: range) -> None:
        """Digests those of `cells` that no sender is left for."""
        final = self._senders_left.count(0, cells.start, cells.stop)
        if final == len(cells):
            self._set_digests(cells, cell_digests(self.view(cells)))
        elif final:
            for cell in cells:
                if not self._senders_left[cell]:
                    one = range(cell, cell + 1)
                    self._set_digests(one, cell_digests(self.view(one)))

    def _set_digests(self, cells: range, digests: bytes) -> None:
        self._digests[cells.start * DIGEST_BYTES : cells.stop * DIGEST_BYTES] = digests

    def finish(self, cancelled: Callable[[], bool]) -> bytes:
        """Makes the cells that nobody sends; returns the digests of all."""
        begin = self._begun.find(0)
        while begin >= 0:
            end = self._begun.find(1, begin, begin + _TAIL_CELLS)
            piece = range(begin, end if end >= 0 else min(begin + _TAIL_CELLS, len(self._begun)))
            with self.lock:
                if cancelled():  # the slot may be another step's already
                    break
                self._make_unsent(piece)
            begin = self._begun.find(0, piece.stop)
        return bytes(self._digests)

    def _make_unsent(self, cells: range) -> None:
        if self._base is not None:
            self._copy_base(cells)
            digests = self._base.digests[self._index]
            self._set_digests(cells, digests[cells.start * DIGEST_BYTES : cells.stop * DIGEST_BYTES])
        else:
            view = self.view(cells)
            view[:] = _ZEROS[: len(view)]
            self._set_digests(cells, _ZERO_DIGEST * len(cells))

    def _copy_base(self, cells: range) -> None:
        base = self._base
        assert base is not None
        old = base.chunks[self._index][cells.start * CELL_BYTES : cells.stop * CELL_BYTES]
        target = self.view(cells)
        np.copyto(
            np.frombuffer(target, np.uint8), np.frombuffer(old, np.uint8)
        )  # without the interpreter's lock
        digests = base.digests[self._index][cells.start * DIGEST_BYTES : cells.stop * DIGEST_BYTES]
        if wrong := mismatches(target, digests):
            raise CorruptImage(
                f"parity of step {base.step} is damaged", f"{len(wrong)} cells from cell {cells.start} on"
            )
