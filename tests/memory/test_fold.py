"""Folding: whatever the order and the interleaving, the parity is that of the code, or there is none."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.erasure import Code
from ckptd.erasure.stripe import Geometry
from ckptd.errors import CorruptImage
from ckptd.image.digest import CELL_BYTES, cell_digests
from ckptd.memory.change import Run, StripeMap, pieces
from ckptd.memory.fold import Base, Fold

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
        return Fold(self.geometry, self.node, dirty, [self.raw_map() for _ in parts]), dirty

    def raw_map(self) -> StripeMap:
        """Everybody sends everything, as it lies."""
        whole = np.ones(self.cells, np.bool_)
        return StripeMap(whole, tuple(whole for _ in range(self.geometry.data_chunks)))


def send(fold: Fold, stripe: int, source: int, first: int, payload: memoryview | bytes, at: int = -1) -> None:
    """Cells `first`.. of a node that sends all its cells, from where its list stands."""
    scratch = memoryview(bytearray(max(len(payload), CELL_BYTES)))
    count = len(payload) // CELL_BYTES
    run = Run(first if at < 0 else at, range(first, first + count), raw=True)
    fold.take(stripe, source, run, cell_digests(payload), scratch, bringing(payload))


def bringing(payload: memoryview | bytes) -> Callable[[memoryview], None]:
    """Receives this."""

    def receive(room: memoryview) -> None:
        assert len(room) == len(payload)
        room[:] = payload

    return receive


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
    while queues:
        assert not fold.complete
        stripe, source, chunk = key = data.draw(st.sampled_from(sorted(queues)))
        count = data.draw(st.integers(1, cells - queues[key]))
        send(fold, stripe, source, queues[key], world.cell(source, chunk, queues[key], count))
        if data.draw(st.booleans()):  # sent again after a broken connection: from its start, cut in any way
            again = data.draw(st.integers(1, queues[key] + count))
            send(fold, stripe, source, 0, world.cell(source, chunk, 0, again))
        queues[key] += count
        if queues[key] == cells:
            del queues[key]
            assert fold.finish(stripe, source) == (not queues)
    assert fold.complete
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

    def run(stripe: int, source: int, chunk: int) -> None:
        try:
            barrier.wait(10)
            for index in range(world.cells):
                send(fold, stripe, source, index, world.cell(source, chunk, index))
            fold.finish(stripe, source)
        except BaseException as error:  # noqa: BLE001 - a thread's top frame; shown below
            failed.append(error)

    threads = [
        threading.Thread(target=run, args=contribution)
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


def test_whose_turn_it_is_is_asked_when_the_bytes_are_there() -> None:
    """The race above, made certain: the old frame is still being received while the new one is folded."""
    world = World.make(4, 2, 0, 2, 3)
    fold, chunks = world.fold()
    for stripe, source, chunk in world.contributions():
        cell, scratch = world.cell(source, chunk, 0), memoryview(bytearray(CELL_BYTES))
        behind = threading.Thread(target=send, args=(fold, stripe, source, 0, cell))

        def receive(old: memoryview, cell: memoryview = cell, behind: threading.Thread = behind) -> None:
            old[:] = cell
            behind.start()
            behind.join(0.02)

        fold.take(stripe, source, Run(0, range(1), raw=True), cell_digests(cell), scratch, receive)
        behind.join(10)
        assert not behind.is_alive()
        send(fold, stripe, source, 1, world.cell(source, chunk, 1))
        fold.finish(stripe, source)
    assert [bytes(c) for c in chunks] == world.expected()


@pytest.fixture
def world() -> World:
    return World.make(4, 1, 1, 3, 17)


def test_cells_out_of_turn_are_refused(world: World) -> None:
    fold, chunks = world.fold()
    stripe, source, chunk = world.contributions()[0]
    with pytest.raises(ValueError, match="out of turn, expected 0"):
        send(fold, stripe, source, 1, world.cell(source, chunk, 1))
    send(fold, stripe, source, 0, world.cell(source, chunk, 0))
    with pytest.raises(ValueError, match="out of turn, expected 1"):
        send(fold, stripe, source, 2, world.cell(source, chunk, 2))
    # Half of it was folded already: the other half counts.
    send(fold, stripe, source, 0, world.cell(source, chunk, 0, 2))
    assert fold.next_of(stripe, source) == 2
    _complete(world, fold)
    assert [bytes(c) for c in chunks] == world.expected()


def _complete(world: World, fold: Fold) -> None:
    for stripe, source, chunk in world.contributions():
        for index in range(world.cells):
            send(fold, stripe, source, index, world.cell(source, chunk, index))
        fold.finish(stripe, source)
    assert fold.complete


def test_what_is_not_awaited_here_is_refused(world: World) -> None:
    """Foreign stripes, our own chunks, and numbers that do not exist."""
    fold, chunks = world.fold()
    wanted = {(stripe, source) for stripe, source, _ in world.contributions()}
    for stripe in range(-1, 6):
        for source in range(-1, 6):
            if (stripe, source) not in wanted:
                with pytest.raises(ValueError):
                    send(fold, stripe, source, 0, bytes(CELL_BYTES))
                with pytest.raises(ValueError):
                    fold.finish(stripe, source)
    _complete(world, fold)
    assert [bytes(c) for c in chunks] == world.expected()


def test_a_contribution_is_ticked_off_only_when_all_its_cells_are_folded(world: World) -> None:
    fold, _ = world.fold()
    stripe, source, chunk = world.contributions()[0]
    send(fold, stripe, source, 0, world.cell(source, chunk, 0, 2))
    with pytest.raises(ValueError, match="ends after 2 cells, expected 3"):
        fold.finish(stripe, source)
    assert not fold.done(stripe, source)
    send(fold, stripe, source, 2, world.cell(source, chunk, 2))
    assert not fold.finish(stripe, source)
    assert not fold.finish(stripe, source)  # said twice
    assert fold.done(stripe, source)


def test_images_of_nothing_fold_to_zeros() -> None:
    """A group whose other images are shorter: nothing travels, and the parity is zeros, not old bytes."""
    world = World.make(3, 1, 0, 20, 1)
    dirty = memoryview(bytearray(b"\xa5" * (20 * CELL_BYTES)))
    nothing = np.zeros(20, np.bool_)
    fold = Fold(world.geometry, 0, [dirty], [StripeMap(~nothing, (nothing, nothing))])
    for stripe, source, _ in world.contributions():
        fold.finish(stripe, source)
    assert fold.digests() == [cell_digests(bytes(20 * CELL_BYTES))]
    assert bytes(dirty) == bytes(20 * CELL_BYTES)


@pytest.mark.parametrize("where", ["in place", "from scratch"])
def test_bytes_that_did_not_come_whole_count_for_nothing(where: str) -> None:
    world = World.make(4, 2, 1, 2, 23)
    fold, chunks = world.fold()
    for stripe, source, _ in world.contributions():
        symbol = world.geometry.symbol_on(source, stripe)
        p = world.geometry.symbol_on(1, stripe) - world.geometry.data_chunks
        in_place = Code(2, 2).is_one(symbol, p)
        if in_place == (where == "in place"):
            scratch = memoryview(bytearray(CELL_BYTES))
            with pytest.raises(OSError, match="gone"):
                fold.take(stripe, source, Run(0, range(1), raw=True), bytes(16), scratch, _half)
            assert fold.next_of(stripe, source) == 0 and not fold.busy
    _complete_two(world, fold)
    assert [bytes(c) for c in chunks] == world.expected()


def _half(room: memoryview) -> None:
    room[:100] = b"x" * 100
    raise OSError("the peer is gone")


def _complete_two(world: World, fold: Fold) -> None:
    for stripe, source, chunk in world.contributions():
        send(fold, stripe, source, 0, world.cell(source, chunk, 0, world.cells))
        fold.finish(stripe, source)
    assert fold.complete
    assert fold.digests() == [cell_digests(chunk) for chunk in world.expected()]


def test_after_cancel_nothing_is_begun(world: World) -> None:
    """The slot belongs to another step once cancel returned, also for a fold that was complete."""
    fold, chunks = world.fold()
    stripe, source, chunk = world.contributions()[0]
    send(fold, stripe, source, 0, world.cell(source, chunk, 0))
    fold.cancel()
    assert fold.cancelled and not fold.busy
    chunks[0][:] = b"\x5a" * len(chunks[0])
    with pytest.raises(ValueError, match="given up"):
        send(fold, stripe, source, 1, world.cell(source, chunk, 1))
    assert bytes(chunks[0]) == b"\x5a" * len(chunks[0])

    empty, others = world.fold()
    nothing = np.zeros(world.cells, np.bool_)
    empty = Fold(world.geometry, world.node, others, [StripeMap(~nothing, (nothing,) * 3)])
    for stripe, source, _ in world.contributions():
        empty.finish(stripe, source)
    assert empty.complete
    empty.cancel()
    others[0][:] = b"\x5a" * len(others[0])
    empty.digests()
    assert bytes(others[0]) == b"\x5a" * len(others[0])


def test_a_slot_is_busy_while_bytes_come_in_where_the_parity_lies() -> None:
    world = World.make(2, 1, 0, 2, 3)
    fold, _ = world.fold()
    [(stripe, source, chunk)] = world.contributions()
    cell = world.cell(source, chunk, 0)

    def receive(room: memoryview) -> None:
        assert fold.busy
        fold.cancel()
        assert fold.busy, "the slot would be given away while it is written"
        room[:] = cell

    fold.take(stripe, source, Run(0, range(1), raw=True), cell_digests(cell), memoryview(b""), receive)
    assert not fold.busy and fold.next_of(stripe, source) == 0


# Delta mode


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_differences_onto_the_older_parity_give_the_new_one(data: st.DataObject) -> None:
    nodes, parity = data.draw(st.sampled_from(GROUPS))
    node, cells = data.draw(st.integers(0, nodes - 1)), data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 1 << 30))
    old = World.make(nodes, parity, node, cells, seed)
    new, maps = _changed(old, data)
    base = _base(old)
    dirty = [memoryview(bytearray(b"\xa5" * (cells * CELL_BYTES))) for _ in range(parity)]
    fold = Fold(new.geometry, node, dirty, maps, base)
    queues = dict.fromkeys(new.contributions(), 0)
    while queues:
        key = data.draw(st.sampled_from(sorted(queues)))
        queues[key] = _send_some(fold, old, new, key, queues[key], data.draw(st.integers(1, 3)))
        stripe, source, _ = key
        if queues[key] == int(fold.map_of(stripe).sends[new.geometry.symbol_on(source, stripe)].sum()):
            del queues[key]
            assert fold.finish(stripe, source) == (not queues)
    assert fold.digests() == [cell_digests(chunk) for chunk in new.expected()]
    assert [bytes(chunk) for chunk in dirty] == new.expected()
    assert [bytes(chunk) for chunk in base.chunks] == old.expected(), "parity is never changed in place"


def _changed(old: World, data: st.DataObject) -> tuple[World, list[StripeMap]]:
    """Another world, of which any cells differ, and the maps that follow."""
    chunks, geometry = {key: bytearray(value) for key, value in old.chunks.items()}, old.geometry
    maps = []
    for p in range(geometry.parity):
        stripe = geometry.parity_stripe(old.node, p)
        sends = []
        for symbol in range(geometry.data_chunks):
            mask = np.array(data.draw(st.lists(st.booleans(), min_size=old.cells, max_size=old.cells)))
            chunk = chunks[geometry.data_source(stripe, symbol)]
            for cell in np.flatnonzero(mask):
                chunk[cell * CELL_BYTES + data.draw(st.integers(0, CELL_BYTES - 1))] ^= 0x41
            sends.append(mask)
        maps.append(StripeMap(np.stack(sends).all(axis=0), tuple(sends)))
    new = World(geometry, old.node, old.cells, {key: bytes(value) for key, value in chunks.items()})
    return new, maps


def _base(old: World) -> Base:
    chunks = old.expected()
    return Base(4, [memoryview(bytearray(chunk)) for chunk in chunks], [cell_digests(c) for c in chunks])


def _send_some(fold: Fold, old: World, new: World, key: tuple[int, int, int], at: int, count: int) -> int:
    """Sends `count` cells of a node's list from `at` on; returns the new position."""
    stripe, source, chunk = key
    of_map = fold.map_of(stripe)
    runs = of_map.runs(new.geometry.symbol_on(source, stripe))
    end = min(at + count, runs[-1].end if runs else 0)
    for run in pieces(runs, at, end, limit=2):
        payload = bytearray()
        for cell in run.cells:
            now = np.frombuffer(new.cell(source, chunk, cell), np.uint8)
            before = np.frombuffer(old.cell(source, chunk, cell), np.uint8)
            payload += bytes(now if run.raw else now ^ before)
        scratch = memoryview(bytearray(len(payload)))
        fold.take(stripe, source, run, cell_digests(payload), scratch, bringing(bytes(payload)))
    return end


@pytest.mark.parametrize("touched", [True, False])
def test_a_damaged_base_is_never_copied(touched: bool) -> None:
    world = World.make(4, 1, 1, 3, 29)
    base = _base(world)
    base.chunks[0][CELL_BYTES + 5] ^= 1
    sends = tuple(np.array([False, touched and symbol == 0, False]) for symbol in range(3))
    dirty = [memoryview(bytearray(3 * CELL_BYTES))]
    fold = Fold(world.geometry, 1, dirty, [StripeMap(np.zeros(3, np.bool_), sends)], base)
    with pytest.raises(CorruptImage, match="parity of step 4 is damaged"):
        for stripe, source, chunk in world.contributions():
            if touched and world.geometry.symbol_on(source, stripe) == 0:
                send(fold, stripe, source, 1, world.cell(source, chunk, 1), at=0)
            fold.finish(stripe, source)
        fold.digests()
