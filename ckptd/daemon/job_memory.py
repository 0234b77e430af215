"""The memory of one job on one node: its arenas, what is held in them, what is being folded.

Lives on the event loop alone.  It knows places and lifetimes; which step is due, and
who may capture it, is the job's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ckptd.errors import NotFound
from ckptd.failpoints import failpoint
from ckptd.image.digest import CELL_BYTES
from ckptd.memory import records
from ckptd.memory.arena import Arena
from ckptd.memory.fold import Fold
from ckptd.memory.holding import Holding, Parity, Place, free_slots, releasable

# Parity belongs to no image plan; its arenas carry this in the plan's place.
NO_PLAN = bytes(16)

Key = tuple[int, int]


class JobMemory:
    """Arenas by (label, plan hash), holdings and folds by (generation, step)."""

    def __init__(self, job: str, node: str, directory: Path) -> None:
        self.directory = directory
        self.arenas: dict[tuple[str, bytes], Arena] = {}
        self.holdings: dict[Key, Holding] = {}
        self.folds: dict[Key, Fold] = {}
        # Arenas that are being made beside the loop.
        self._preparing: set[tuple[str, bytes]] = set()
        self._gone = False
        self._occupied: list[Place] = []
        # Parity slots of folds that were given up while bytes came in.
        self._ending: list[tuple[int, Fold]] = []
        # Set, and replaced, whenever slots may have become free, or a wait for seals or folds may end.
        self.freed = asyncio.Event()
        self._job = job
        self._node = node

    def nbytes(self) -> tuple[int, int]:
        """(bytes of the ranks' arenas, bytes of parity arenas)."""
        parity = sum(arena.nbytes for (label, _), arena in self.arenas.items() if label.startswith("parity"))
        return sum(arena.nbytes for arena in self.arenas.values()) - parity, parity

    def rank_arena(self, rank: int, plan_hash: bytes) -> Arena | None:
        """The arena of a rank's plan, if there is one."""
        return self.arenas.get((rank_label(rank), plan_hash))

    def make_rank_arena(self, rank: int, plan_hash: bytes, slots: int, image_bytes: int) -> Arena:
        """A new arena for a rank's plan.

        Raises:
            NoSpace: the tmpfs is full.
        """
        label = rank_label(rank)
        arena = Arena.create(self.directory, label, plan_hash, slots, image_bytes)
        self.arenas[label, plan_hash] = arena
        return arena

    async def prepare_rank_arena(
        self, rank: int, plan_hash: bytes, slots: int, image_bytes: int, *, sparse: bool = False
    ) -> None:
        """Makes a rank's arena where there is none, beside the loop: taking its pages takes a while.

        Args:
            sparse: its pages are taken as they are written; a trainer gets it only after a
                call without this.

        Raises:
            NoSpace: the tmpfs is full.
            NotFound: the job was freed meanwhile.
        """
        await self._prepare(rank_label(rank), plan_hash, slots, image_bytes, sparse)

    async def prepare_parity(self, slots: int, nbytes: int) -> None:
        """Makes the arenas for the parity of `slots` steps, `nbytes` each, where there are none.

        Raises:
            NoSpace: the tmpfs is full.
            NotFound: the job was freed meanwhile.
        """
        for slot in self._free_parity_slots(slots):
            await self._prepare(parity_label(slot), NO_PLAN, 1, max(nbytes, CELL_BYTES), False)

    async def _prepare(self, label: str, plan_hash: bytes, slots: int, nbytes: int, sparse: bool) -> None:
        key = (label, plan_hash)
        while key in self._preparing:
            await self.freed.wait()
        arena = self.arenas.get(key)
        if arena is not None and (sparse or arena.whole):
            return
        self._preparing.add(key)
        try:
            if arena is None:
                create = functools.partial(Arena.create, sparse=sparse)
                arena = await asyncio.to_thread(create, self.directory, label, plan_hash, slots, nbytes)
            else:
                await asyncio.to_thread(arena.allocate)
        finally:
            self._preparing.discard(key)
            self.stir()
        if self._gone:
            arena.discard()
            raise NotFound(f"the memory of job {self._job} was freed", "", "attach again")
        self.arenas[key] = arena

    def free_slots(self, arena: Arena, taken: Iterable[int] = ()) -> list[int]:
        """Slots of `arena` that hold nothing and are not `taken`, ascending."""
        busy = [place.slot for place in self._occupied if place.arena is arena]
        return free_slots(arena, self.holdings.values(), [*taken, *busy])

    @contextlib.contextmanager
    def occupied(self, places: Iterable[Place]) -> Iterator[None]:
        """Keeps slots from being given to anybody while they are written."""
        mine = list(places)
        self._occupied += mine
        try:
            yield
        finally:
            for place in mine:
                self._occupied.remove(place)
            self.stir()

    def holding_at(self, generation: int, step: int) -> Holding:
        """The holding of that step.

        Raises:
            NotFound: this node holds no such step.
        """
        holding = self.holdings.get((generation, step))
        if holding is None:
            raise NotFound(
                f"node {self._node} holds no step {step} of generation {generation} of job {self._job}"
            )
        return holding

    def save(self, holding: Holding) -> None:
        """Writes a holding's record, unless it was released meanwhile."""
        if self.holdings.get(holding.key) is holding:
            path = records.holding_path(self.directory, *holding.key)
            records.write_record(path, holding.record(self._job))

    def release(self, key: Key) -> None:
        """Frees one holding: its record first, then its slots."""
        holding = self.holdings.pop(key, None)
        if holding is None:
            return
        records.holding_path(self.directory, *key).unlink(missing_ok=True)
        failpoint("daemon.releasing")
        self._cancel(holding)
        holding.parity = None
        self.stir()

    def stir(self) -> None:
        """Wakes everything that waits for this memory to change."""
        self.freed.set()
        self.freed = asyncio.Event()

    def release_unneeded(self, generation: int, watermark: int | None, given_up: Iterable[int]) -> None:
        """Frees every holding that the one rule allows to free."""
        for key in releasable(self.holdings, generation, watermark, given_up):
            self.release(key)

    def void(self, generation: int, start_step: int) -> None:
        """A new generation begins at `start_step`: what older ones did beyond it never was."""
        for holding in self.holdings.values():
            self._cancel(holding)
        for key, holding in list(self.holdings.items()):
            beyond = holding.generation < generation and holding.step > start_step
            if beyond or not (holding.rank_seals or holding.folded):
                self.release(key)

    def place_parity(self, holding: Holding, chunk_bytes: int, slots: int, start: Key) -> Parity | None:
        """A free place for a holding's parity chunks, or None while there is none.

        Args:
            slots: steps whose parity may be kept at the same time.
            start: the (generation, step) that the present generation started from.
        """
        free = self._free_parity_slots(slots)
        if not free and self._evict_parity(holding.generation, start):
            free = self._free_parity_slots(slots)
        if not free:
            return None
        arena = self._parity_arena(free[0], chunk_bytes * holding.parity_count)
        view = arena.slot(0)
        chunks = [view[p * chunk_bytes : (p + 1) * chunk_bytes] for p in range(holding.parity_count)]
        return Parity(free[0], chunk_bytes, chunks)

    def drop_unused(self, ranks: Collection[int], plans: dict[int, bytes]) -> None:
        """Frees arenas that hold nothing and belong to no rank here, or to a plan that was replaced.

        Args:
            ranks: ranks of this node in the newest roster.
            plans: the plan in use of each living rank.
        """
        held = {id(place.arena) for h in self.holdings.values() for place in h.places.values()}
        for (label, plan_hash), arena in list(self.arenas.items()):
            if label.startswith("parity") or id(arena) in held:
                continue
            rank = int(label.removeprefix("rank-"))
            if rank not in ranks or plans.get(rank, plan_hash) != plan_hash:
                self.arenas.pop((label, plan_hash)).discard()

    def discard(self) -> None:
        """Frees everything; records first, so that nothing half-freed is adopted."""
        self._gone = True
        for key in list(self.holdings):
            self.release(key)
        for arena in self.arenas.values():
            arena.discard()
        self.arenas.clear()

    def _cancel(self, holding: Holding) -> None:
        """Gives up the fold of this holding, if one is under way."""
        fold = self.folds.pop(holding.key, None)
        if fold is not None and holding.parity is not None:
            fold.cancel()
            self._ending.append((holding.parity.slot, fold))

    def _free_parity_slots(self, slots: int) -> list[int]:
        self._ending = [(slot, fold) for slot, fold in self._ending if fold.busy]
        used = {h.parity.slot for h in self.holdings.values() if h.parity is not None}
        used |= {slot for slot, _ in self._ending}
        return [slot for slot in range(slots) if slot not in used]

    def _evict_parity(self, generation: int, start: Key) -> bool:
        """Drops parity of an older generation; returns whether there was any to drop.

        Parity of a step that was never folded protects nothing certain and goes first.
        While this generation has no watermark, the step that it started from has no other
        protection than its folded parity: one of those stays until the watermark frees it.
        """
        older = [h for h in self.holdings.values() if h.generation < generation and h.parity is not None]
        starts = [h for h in older if h.folded and h.step == start[1]]
        kept = max(starts, key=lambda h: (h.key == start, h.generation), default=None)
        older = [h for h in older if h is not kept]
        if not older:
            return False
        holding = min(older, key=lambda h: (h.folded, h.step))
        holding.parity, holding.folded = None, False
        self.save(holding)
        return True

    def _parity_arena(self, slot: int, nbytes: int) -> Arena:
        key = (parity_label(slot), NO_PLAN)
        arena = self.arenas.get(key)
        if arena is None or arena.slot_bytes < nbytes:
            if arena is not None:
                arena.discard()
            arena = Arena.create(self.directory, key[0], NO_PLAN, 1, max(nbytes, CELL_BYTES))
            self.arenas[key] = arena
        return arena


def parity_label(slot: int) -> str:
    """How the arena of a parity slot is labelled."""
    return f"parity-{slot:05d}"


def rank_label(rank: int) -> str:
    """How a rank's arenas are labelled."""
    return f"rank-{rank:05d}"
