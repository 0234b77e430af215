"""Folding: whatever the order and the interleaving, the parity is that of the code, or there is none."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.erasure import Code
from ckptd.erasure.stripe import Geometry
from ckptd.image.digest import CELL_BYTES, cell_digests
from ckptd.memory.fold import Fold

GROUPS = [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (5, 2), (5, 3)]


@dataclass
class World:
    """A group with random images; what node `node` has to fold, and what must come of it."""

    geometry: Geometry
    node: int
    cells: int
    # Chunk of each (node, chunk): bytes of `cells` cells.
    chunks: dict[tuple[int, int], bytes]

    @classmethod
    def make(cls, nodes: int, parity: int, node: int, cells: int, seed: int) -> World:
        geometry, rng = Geometry(nodes, parity), random.Random(seed)
        chunks = {
            (i, c): rng.randbytes(cells * CELL_BYTES)
            for i in range(nodes)
            for c in range(geometry.data_chunks)
        }
        return cls(geometry, node, cells, chunks)

    def contributions(self) -> list[tuple[int, int, int]]:
        """(stripe, node, chunk) of everything that this node folds."""
        out = []
        for p in range(self.geometry.parity):
            stripe = self.geometry.parity_stripe(self.node, p)
            sources = [self.geometry.data_source(stripe, s) for s in range(self.geometry.data_chunks)]
            out += [(stripe, source, chunk) for source, chunk in sources]
        return out

    def cell(self, node: int, chunk: int, index: int, count: int = 1) -> memoryview:
        return memoryview(self.chunks[node, chunk])[index * CELL_BYTES : (index + count) * CELL_BYTES]

    def expected(self) -> list[bytes]:
        """The parity chunks of this node, as the code itself encodes them."""
        code, out = Code(self.geometry.data_chunks, self.geometry.parity), []
        for p in range(self.geometry.parity):
            stripe = self.geometry.parity_stripe(self.node, p)
            sources = [self.geometry.data_source(stripe, s) for s in range(self.geometry.data_chunks)]
            parity = [bytearray(self.cells * CELL_BYTES) for _ in range(self.geometry.parity)]
            code.encode([self.chunks[source] for source in sources], parity)
            out.append(bytes(parity[p]))
        return out

    def fold(self) -> tuple[Fold, list[memoryview]]:
        """A fold over buffers that hold another step's bytes still."""
        parts = range(self.geometry.parity)
        dirty = [memoryview(bytearray(b"\xa5" * (self.cells * CELL_BYTES))) for _ in parts]
        return Fold(self.geometry, self.node, dirty), dirty


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_order_and_interleaving_gives_the_codes_parity(data: st.DataObject) -> None:
    nodes, parity = data.draw(st.sampled_from(GROUPS))
    node = data.draw(st.integers(0, nodes - 1))
    cells = data.draw(st.integers(1, 3))
    world = World.make(nodes, parity, node, cells, data.draw(st.integers(0, 1 << 30)))
    fold, chunks = world.fold()
    # One queue per contribution; each is in order, and they mix in any way.
    queues = dict.fromkeys(world.contributions(), 0)
    assert fold.missing == sorted({(stripe, source) for stripe, source, _ in queues})
    while queues:
        assert not fold.complete
        stripe, source, chunk = key = data.draw(st.sampled_from(sorted(queues)))
        count = data.draw(st.integers(1, cells - queues[key]))
        fold.add(stripe, source, chunk, queues[key], world.cell(source, chunk, queues[key], count))
        if data.draw(st.booleans()):  # sent again after a broken connection: from its start, cut in any way
            again = data.draw(st.integers(1, queues[key] + count))
            fold.add(stripe, source, chunk, 0, world.cell(source, chunk, 0, again))
        queues[key] += count
        if queues[key] == cells:
            del queues[key]
            assert fold.finish(stripe, source, cells) == (not queues)
    assert fold.complete and fold.missing == []
    assert [bytes(chunk) for chunk in chunks] == world.expected()
    assert fold.digests() == [cell_digests(chunk) for chunk in world.expected()]


def test_threads_that_send_the_same_fold_each_cell_once() -> None:
    """A sender that lost its connection sends again while its old frames are still being folded."""
    seed = 11
    print(f"seed {seed}")
    for attempt in range(15):
        _race(World.make(4, 2, attempt % 4, 6, seed + attempt), senders=3)


def _race(world: World, senders: int) -> None:
    fold, chunks = world.fold()
    barrier = threading.Barrier(senders * len(world.contributions()))
    failed: list[BaseException] = []

    def send(stripe: int, source: int, chunk: int) -> None:
        try:
            barrier.wait(10)
            for index in range(world.cells):
                fold.add(stripe, source, chunk, index, world.cell(source, chunk, index))
            fold.finish(stripe, source, world.cells)
        except BaseException as error:  # noqa: BLE001 - a thread's top frame; shown below
            failed.append(error)

    threads = [
        threading.Thread(target=send, args=contribution)
        for contribution in world.contributions()
        for _ in range(senders)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failed, failed[0]
    assert fold.complete
    assert [bytes(chunk) for chunk in chunks] == world.expected()


class _Gate:
    """A lock that lets a test stand between the check of whose turn it is and the fold."""

    def __init__(self, between: threading.Event, go: threading.Event) -> None:
        self._lock, self._between, self._go = threading.Lock(), between, go
        self._first = True

    def __enter__(self) -> None:
        if self._first:
            self._first = False
            self._between.set()
            assert self._go.wait(10)
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


def test_the_turn_is_checked_under_the_lock() -> None:
    """The race above, made certain: the old frame waits at the lock while the new one is folded."""
    world = World.make(2, 1, 0, 1, 3)
    fold, chunks = world.fold()
    [(stripe, source, chunk)] = world.contributions()
    between, go = threading.Event(), threading.Event()
    fold._locks = [_Gate(between, go)]  # type: ignore[list-item]
    cell = world.cell(source, chunk, 0)
    old = threading.Thread(target=fold.add, args=(stripe, source, chunk, 0, cell))
    old.start()
    assert between.wait(10)
    fold.add(stripe, source, chunk, 0, cell)
    go.set()
    old.join(10)
    fold.finish(stripe, source, 1)
    assert [bytes(c) for c in chunks] == world.expected()


@pytest.fixture
def world() -> World:
    return World.make(4, 1, 1, 3, 17)


def test_cells_out_of_turn_are_refused(world: World) -> None:
    fold, chunks = world.fold()
    stripe, source, chunk = world.contributions()[0]
    with pytest.raises(ValueError, match="out of turn, expected 0"):
        fold.add(stripe, source, chunk, 1, world.cell(source, chunk, 1))
    fold.add(stripe, source, chunk, 0, world.cell(source, chunk, 0))
    with pytest.raises(ValueError, match="out of turn, expected 1"):
        fold.add(stripe, source, chunk, 2, world.cell(source, chunk, 2))
    # Half of it was folded already: the other half counts.
    fold.add(stripe, source, chunk, 0, world.cell(source, chunk, 0, 2))
    with pytest.raises(ValueError, match="a chunk of"):
        fold.add(stripe, source, chunk, 2, memoryview(bytes(2 * CELL_BYTES)))
    with pytest.raises(ValueError, match="whole cells"):
        fold.add(stripe, source, chunk, 2, world.cell(source, chunk, 2)[:-1])
    _complete(world, fold)
    assert [bytes(c) for c in chunks] == world.expected()


def _complete(world: World, fold: Fold) -> None:
    for stripe, source, chunk in world.contributions():
        for index in range(world.cells):
            fold.add(stripe, source, chunk, index, world.cell(source, chunk, index))
        fold.finish(stripe, source, world.cells)
    assert fold.complete


def test_what_is_not_awaited_here_is_refused_even_when_empty(world: World) -> None:
    """Foreign stripes, our own chunks, another chunk of the right node, and numbers that do not exist."""
    fold, chunks = world.fold()
    wanted = set(world.contributions())
    nothing = memoryview(b"")
    for stripe in range(-1, 6):
        for source in range(-1, 6):
            for chunk in range(-1, 4):
                if (stripe, source, chunk) in wanted:
                    continue
                for cells in (nothing, memoryview(bytes(CELL_BYTES))):
                    with pytest.raises(ValueError):
                        fold.add(stripe, source, chunk, 0, cells)
    for stripe, source in [(0, 0), (1, 1), (9, 9)]:
        with pytest.raises(ValueError):
            fold.finish(stripe, source, 0)
    _complete(world, fold)
    assert [bytes(c) for c in chunks] == world.expected()


def test_a_contribution_is_ticked_off_only_when_all_its_cells_are_folded(world: World) -> None:
    fold, _ = world.fold()
    stripe, source, chunk = world.contributions()[0]
    fold.add(stripe, source, chunk, 0, world.cell(source, chunk, 0, 2))
    with pytest.raises(ValueError, match="ends after 2 cells, expected 3"):
        fold.finish(stripe, source, 3)
    assert (stripe, source) in fold.missing
    fold.add(stripe, source, chunk, 2, world.cell(source, chunk, 2))
    assert not fold.finish(stripe, source, 3)
    assert not fold.finish(stripe, source, 3)  # said twice
    assert (stripe, source) not in fold.missing


def test_images_of_nothing_fold_to_zeros() -> None:
    """A group whose other images are shorter: nothing travels, and the parity is zeros, not old bytes."""
    world = World.make(3, 1, 0, 2, 1)
    fold, chunks = world.fold()
    for stripe, source, chunk in world.contributions():
        fold.add(stripe, source, chunk, 0, memoryview(b""))
        fold.finish(stripe, source, 0)
    assert fold.digests() == [cell_digests(bytes(2 * CELL_BYTES))]
    assert bytes(chunks[0]) == bytes(2 * CELL_BYTES)


def test_after_cancel_nothing_is_written(world: World) -> None:
    """The slot belongs to another step once cancel returned, also for a fold that was complete."""
    fold, chunks = world.fold()
    stripe, source, chunk = world.contributions()[0]
    fold.add(stripe, source, chunk, 0, world.cell(source, chunk, 0))
    fold.cancel()
    chunks[0][:] = b"\x5a" * len(chunks[0])
    with pytest.raises(ValueError, match="given up"):
        fold.add(stripe, source, chunk, 1, world.cell(source, chunk, 1))
    assert bytes(chunks[0]) == b"\x5a" * len(chunks[0])

    empty, others = world.fold()
    for stripe, source, _ in world.contributions():
        empty.finish(stripe, source, 0)
    assert empty.complete
    empty.cancel()
    others[0][:] = b"\x5a" * len(others[0])
    empty.digests()
    assert bytes(others[0]) == b"\x5a" * len(others[0])


def test_cancel_waits_for_the_cell_that_is_being_folded() -> None:
    world = World.make(2, 1, 0, 1, 3)
    fold, chunks = world.fold()
    [(stripe, source, chunk)] = world.contributions()
    entered, go = threading.Event(), threading.Event()
    update = fold._code.update_one

    def slow(*arguments: object) -> None:
        entered.set()
        assert go.wait(10)
        update(*arguments)  # type: ignore[arg-type]

    fold._code.update_one = slow  # type: ignore[assignment]
    sender = threading.Thread(target=fold.add, args=(stripe, source, chunk, 0, world.cell(source, chunk, 0)))
    sender.start()
    assert entered.wait(10)
    cancelling = threading.Thread(target=fold.cancel)
    cancelling.start()
    cancelling.join(0.05)
    assert cancelling.is_alive(), "the slot would be given away while it is written"
    go.set()
    cancelling.join(10)
    sender.join(10)
    assert [bytes(c) for c in chunks] == world.expected()
