"""Which cells of a stripe travel to its parity, and how: raw and delta mode.

The code is linear, so parity of a new step is the parity of an older one with the
differences folded in.  A cell of the parity is made in one of two modes:

    raw     it starts from zeros; every chunk that covers the cell is folded in
    delta   it starts from the base's parity; of the chunks that changed, old xor new

Raw where all chunks changed, since then it saves nothing to know the old bytes.  Both ends
derive the same map from the seal records of the step and of its base.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from ckptd.erasure.stripe import Geometry
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES
from ckptd.memory.holding import Holding, chunk_cells, node_digests
from ckptd.v1 import bulk_pb2

# A base is worth its copy when it saves at least this part of the traffic.
_WORTHWHILE = 0.1

Mask = NDArray[np.bool_]
Digests = NDArray[np.uint8]


class Run(NamedTuple):
    """Neighbouring cells that one node sends one after another, in one mode."""

    # Position of the first one in the list of all cells that the node sends.
    first: int
    # In the chunk.
    cells: range
    raw: bool

    @property
    def end(self) -> int:
        """Position after the last one."""
        return self.first + len(self.cells)


@dataclass(frozen=True)
class StripeMap:
    """The cells of one stripe.

    Invariant: a cell that nobody sends starts from the base, or is zeros where there is none.
    """

    # Per cell of the chunks: whether parity starts from zeros.
    raw: Mask
    # Per data symbol: the cells that its node sends.
    sends: tuple[Mask, ...]

    @property
    def digest(self) -> bytes:
        """16 bytes that two equal maps share."""
        return bytes(xxh3_128_digest(b"".join(mask.tobytes() for mask in (self.raw, *self.sends))))

    @property
    def sent(self) -> int:
        """Cells that travel, from all senders."""
        return sum(int(mask.sum()) for mask in self.sends)

    def runs(self, symbol: int) -> list[Run]:
        """What the node of this data symbol sends, in order; neighbours in as few runs as can be."""
        cells = np.flatnonzero(self.sends[symbol])
        raw = self.raw[cells]
        starts = np.flatnonzero((np.diff(cells) != 1) | np.diff(raw)) + 1
        edges = [0, *starts.tolist(), len(cells)] if len(cells) else []
        return [
            Run(first, range(int(cells[first]), int(cells[end - 1]) + 1), bool(raw[first]))
            for first, end in itertools.pairwise(edges)
        ]


def pieces(runs: Sequence[Run], first: int, end: int, limit: int) -> Iterator[Run]:
    """What lies at positions first..end-1 of the list, in pieces of one run and of at most `limit` cells.

    Args:
        runs: of the whole list, which has `end` cells or more.
    """
    index = bisect.bisect_right(runs, first, key=lambda run: run.first) - 1
    while first < end:
        run = runs[index]
        cells = run.cells[first - run.first :][: min(limit, end - first)]
        yield Run(first, cells, run.raw)
        first += len(cells)
        index += first == run.end


def digest_table(seal: bulk_pb2.SealRecord) -> Digests:
    """The digests of all cells of a node's image, shape (cells, 16), uint8."""
    return np.frombuffer(node_digests(seal), np.uint8).reshape(-1, DIGEST_BYTES)


def stripe_map(
    geometry: Geometry,
    group: Sequence[str],
    stripe: int,
    seals: Mapping[str, bulk_pb2.SealRecord],
    base: Mapping[str, bulk_pb2.SealRecord] | None,
    chunk_bytes: int,
) -> StripeMap:
    """The map of one stripe.

    Args:
        seals: of the step, of every member of the group.
        base: those of the base, with images of the same lengths; None: all raw.
        chunk_bytes: of the step; a whole number of cells.
    """
    cells = chunk_bytes // CELL_BYTES
    covered = np.zeros((geometry.data_chunks, cells), np.bool_)
    sends = np.zeros((geometry.data_chunks, cells), np.bool_)
    for symbol in range(geometry.data_chunks):
        node, chunk = geometry.data_source(stripe, symbol)
        first, count = chunk_cells(seals[group[node]], chunk, chunk_bytes)
        covered[symbol, :count] = True
        if base is None:
            sends[symbol, :count] = True
            continue
        new = digest_table(seals[group[node]])[first : first + count]
        old = digest_table(base[group[node]])[first : first + count]
        sends[symbol, :count] = (new != old).any(axis=1)
    if base is None:
        raw = np.ones(cells, np.bool_)
    else:
        raw = (sends == covered).all(axis=0) & covered.any(axis=0)
    return StripeMap(raw, tuple(sends))


def can_be_base(holding: Holding, older: Holding) -> bool:
    """Whether `older` has seal records of the same group with images of the same lengths."""
    same_place = (older.generation, older.group, older.position) == (
        holding.generation,
        holding.group,
        holding.position,
    )
    return (
        same_place
        and older.step < holding.step
        and set(older.seals) == set(holding.seals) == set(holding.group)
        and all(_lengths(older.seals[n]) == _lengths(holding.seals[n]) for n in holding.group)
    )


def worthwhile(maps: Sequence[StripeMap], raw: Sequence[StripeMap]) -> bool:
    """Whether `maps`, with a base, send enough less than `raw` ones to pay for the base's copy."""
    return sum(m.sent for m in maps) <= (1 - _WORTHWHILE) * sum(m.sent for m in raw)


def _lengths(seal: bulk_pb2.SealRecord) -> list[tuple[int, int]]:
    return [(rank.rank, rank.image_bytes) for rank in seal.ranks]
