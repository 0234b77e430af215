"""What one node holds of one (generation, step): images, seal records, parity.

A holding only grows: images are sealed one by one, seal records of the group
arrive, the parity is folded; then it is released as a whole.  Facts that were
reported (sealed, folded) stay true until the release.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ckptd.erasure.stripe import Geometry
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES, cells_of
from ckptd.memory.arena import Arena, padded
from ckptd.v1 import bulk_pb2, coordinator_pb2, memory_pb2


@dataclass(frozen=True)
class Place:
    """Where one rank's image lies, and how long it is (bytes, without padding)."""

    arena: Arena
    slot: int
    image_bytes: int

    @property
    def image(self) -> memoryview:
        return self.arena.slot(self.slot)[: self.image_bytes]

    @property
    def cells(self) -> memoryview:
        """The image with its zero padding, a whole number of cells."""
        return self.arena.slot(self.slot)[: padded(self.image_bytes)]


@dataclass
class Parity:
    """This node's parity chunks of one step; chunk p covers the stripe it has parity p of."""

    slot: int
    chunk_bytes: int
    chunks: list[memoryview]
    # One per chunk once folded, empty before: parity without digests is never served.
    digests: list[bytes] = field(default_factory=list)


@dataclass
class Holding:
    """One (generation, step) on this node.

    Invariant: `seals[position]` exists only when every place named there is digested.
    Invariant: `parity.digests` is filled only when all contributions are folded.
    """

    generation: int
    step: int
    group: tuple[str, ...]
    position: str
    parity_count: int
    ranks: tuple[int, ...]
    places: dict[int, Place] = field(default_factory=dict)
    # Digests of the ranks that are sealed; the node is sealed when all are.
    rank_seals: dict[int, bulk_pb2.RankSeal] = field(default_factory=dict)
    seals: dict[str, bulk_pb2.SealRecord] = field(default_factory=dict)
    parity: Parity | None = None
    folded: bool = False

    @property
    def key(self) -> tuple[int, int]:
        return (self.generation, self.step)

    @property
    def sealed(self) -> bool:
        return self.position in self.seals

    @property
    def protected_group(self) -> bool:
        """Whether the group is large enough to hold parity at all."""
        return len(self.group) > self.parity_count >= 1

    @property
    def geometry(self) -> Geometry:
        assert self.protected_group
        return Geometry(len(self.group), self.parity_count)

    @property
    def index(self) -> int:
        return self.group.index(self.position)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of every chunk of this step; needs the seal records of the whole group."""
        longest = max(node_bytes(self.seals[member]) for member in self.group)
        return self.geometry.chunk_bytes(longest)

    def seal_rank(self, seal: bulk_pb2.RankSeal, job: str) -> bool:
        """Notes one rank's digests; returns whether the whole node is sealed now."""
        self.rank_seals[seal.rank] = seal
        if set(self.rank_seals) != set(self.ranks):
            return False
        self.seals[self.position] = bulk_pb2.SealRecord(
            job=job,
            generation=self.generation,
            step=self.step,
            node=self.position,
            ranks=[self.rank_seals[rank] for rank in self.ranks],
            cell_bytes=CELL_BYTES,
        )
        return True

    def data_cells(self, first: int, count: int) -> list[memoryview]:
        """Views of cells first..first+count-1 of the node's image, zeros beyond its end."""
        views: list[memoryview] = []
        start, need = first * CELL_BYTES, count * CELL_BYTES
        for rank in self.ranks:
            cells = self.places[rank].cells
            if start < len(cells) and need:
                part = cells[start : start + need]
                views.append(part)
                need -= len(part)
                start = 0
            else:
                start = max(0, start - len(cells))
        if need:
            views.append(memoryview(bytes(need)))
        return views

    def write_cells(self, first: int, cells: memoryview) -> None:
        """Writes whole cells of the node's image, from cell `first` on.

        Raises:
            NoSpace: the arena's pages were not taken yet, and the tmpfs is full.
        """
        start = first * CELL_BYTES
        for rank in self.ranks:
            place = self.places[rank]
            room = padded(place.image_bytes)
            if start < room and cells:
                part = cells[: room - start]
                place.arena.write(place.slot, start, part)
                cells = cells[len(part) :]
                start = 0
            else:
                start = max(0, start - room)
        assert not cells, "cells beyond the image"

    def report(self) -> coordinator_pb2.Holding:
        """The facts of this holding, as the coordinator gets them."""
        return coordinator_pb2.Holding(
            generation=self.generation,
            step=self.step,
            group=self.group,
            sealed_ranks=sorted(self.rank_seals),
            sealed=self.sealed,
            folded=self.folded,
            node_bytes=node_bytes(self.seals[self.position]) if self.sealed else 0,
            parity=self.parity_count,
            ranks=self.ranks,
            position=self.position,
        )

    def record(self, job: str) -> memory_pb2.HoldingRecord:
        """What a restarted daemon needs to adopt this holding."""
        parity = self.parity if self.folded else None
        return memory_pb2.HoldingRecord(
            job=job,
            generation=self.generation,
            step=self.step,
            group=self.group,
            position=self.position,
            parity=self.parity_count,
            images=[
                memory_pb2.ImagePlace(
                    rank=rank, plan_hash=place.arena.plan_hash, slot=place.slot, image_bytes=place.image_bytes
                )
                for rank, place in self.places.items()
                if rank in self.rank_seals
            ],
            seals=self.seals.values(),
            folded=self.folded,
            parity_slot=parity.slot if parity else 0,
            chunk_bytes=parity.chunk_bytes if parity else 0,
            parity_digests=parity.digests if parity else [],
        )


def node_bytes(seal: bulk_pb2.SealRecord) -> int:
    """Length of a node's image: its ranks' images one after another, each padded to cells."""
    return sum(padded(rank.image_bytes) for rank in seal.ranks)


def chunk_cells(seal: bulk_pb2.SealRecord, chunk: int, chunk_bytes: int) -> tuple[int, int]:
    """(first, count): the cells of a node's image that its chunk holds; beyond them there are zeros."""
    first = chunk * chunk_bytes // CELL_BYTES
    left = node_bytes(seal) // CELL_BYTES - first
    return first, max(0, min(chunk_bytes // CELL_BYTES, left))


def node_digests(seal: bulk_pb2.SealRecord) -> bytes:
    """The digests of all cells of a node's image, in order."""
    return b"".join(rank.cell_digests for rank in seal.ranks)


def seal_fault(seal: bulk_pb2.SealRecord, job: str, generation: int, step: int, node: str) -> str | None:
    """Why `seal` is not a record of this node's image at this step, or None."""
    named = (seal.job, seal.generation, seal.step, seal.node)
    if named != (job, generation, step, node):
        return f"it names {named}, expected {(job, generation, step, node)}"
    if seal.cell_bytes != CELL_BYTES:
        return f"its cells have {seal.cell_bytes} bytes, expected {CELL_BYTES}"
    if not seal.ranks:
        return "it holds no rank"
    for rank in seal.ranks:
        if len(rank.cell_digests) != DIGEST_BYTES * cells_of(rank.image_bytes):
            return f"rank {rank.rank} has {len(rank.cell_digests)} digest bytes for {rank.image_bytes} bytes"
    return None


def free_slots(arena: Arena, holdings: Iterable[Holding], taken: Iterable[int]) -> list[int]:
    """Slots of `arena` that no holding and no grant (`taken`) uses, ascending."""
    used = set(taken)
    for holding in holdings:
        used |= {place.slot for place in holding.places.values() if place.arena is arena}
    return [slot for slot in range(arena.slots) if slot not in used]


def releasable(
    holdings: Mapping[tuple[int, int], Holding],
    generation: int,
    watermark: int | None,
    aborted: Iterable[int],
) -> list[tuple[int, int]]:
    """The holdings that nobody can need any more.

    The one rule: a slot of step s is reused only when the watermark known here is
    greater than s.  A holding of an older generation goes when *this* generation
    has a watermark; a step that the job gave up goes at once.
    """
    given_up = set(aborted)
    out = []
    for key, holding in holdings.items():
        if holding.generation == generation:
            passed = watermark is not None and holding.step < watermark
            if passed or (holding.step in given_up and (watermark is None or holding.step > watermark)):
                out.append(key)
        elif holding.generation < generation and watermark is not None:
            out.append(key)
    return out
