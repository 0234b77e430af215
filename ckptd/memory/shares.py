"""Bringing a lost image back in shares: every survivor decodes its part and sends it.

A replacement that fetched k symbols of everything itself would wait for its own line
and its own processor; so each survivor decodes a share of every chunk, with the symbol that
it holds itself and k-1 that it fetches, and the replacement receives only what was lost.
What a survivor cannot give is rebuilt the careful way (`Rebuild.cells`), where every symbol is
looked at and a wrong cell is an erased cell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from ckptd.errors import CkptdError, CorruptImage
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES, mismatches
from ckptd.memory.bulk import BLOCK_CELLS, Connection
from ckptd.memory.holding import chunk_cells, node_digests
from ckptd.memory.rebuild import Rebuild
from ckptd.memory.scratch import blocks
from ckptd.v1 import bulk_pb2

log = logging.getLogger("ckptd.rebuild")


class Target(Protocol):
    """Where a lost node's image is to lie; `Holding` is one.  Used from several threads."""

    def write_cells(self, first: int, cells: memoryview) -> None:
        """Writes whole cells from cell `first` on, whether their pages are taken yet or not."""
        ...


@dataclass(frozen=True)
class Share:
    """Cells first..first+cells-1 of a chunk, to be had from one survivor."""

    chunk: int
    first: int
    cells: int


def shares_of(counts: Sequence[int], survivors: int) -> list[list[Share]]:
    """Cuts every chunk evenly among the survivors.

    Args:
        counts: cells of each chunk.
        survivors: how many there are, at least 1.
    """
    out: list[list[Share]] = [[] for _ in range(survivors)]
    for chunk, count in enumerate(counts):
        for index, mine in enumerate(out):
            # The odd cells of one chunk go to other survivors than those of the next.
            turn = (index + chunk) % survivors
            first, end = count * turn // survivors, count * (turn + 1) // survivors
            if end > first:
                mine.append(Share(chunk, first, end - first))
    return out


def collect(rebuild: Rebuild, target: Target, still_wanted: Callable[[], None]) -> None:
    """Brings every cell of the lost image to `target`, verified.

    Args:
        rebuild: with the seal records of the whole group.
        target: gets verified cells only.
        still_wanted: raises when nobody needs this image any more.

    Raises:
        NotEnoughCells: some cell cannot be had, with how many were needed and found.
    """
    survivors: list[tuple[str, str] | None] = [s for s in rebuild.sources if s[0] != rebuild.position]
    if len(survivors) < len(rebuild.sources):
        survivors = []  # somebody has the image as it is, and it is simply fetched
    chunks = range(rebuild.geometry.data_chunks)
    seal, chunk_bytes = rebuild.seals[rebuild.position], rebuild.chunk_bytes
    counts = [chunk_cells(seal, chunk, chunk_bytes)[1] for chunk in chunks]
    work = shares_of(counts, max(1, len(survivors)))
    with ThreadPoolExecutor(len(work), thread_name_prefix="rebuild") as pool:
        jobs = [
            pool.submit(_Collector(rebuild, target, still_wanted).collect, shares, survivor)
            for shares, survivor in zip(work, survivors or [None], strict=True)
        ]
        for job in jobs:
            job.result()


class _Collector:
    """Collects the shares of one survivor."""

    def __init__(self, rebuild: Rebuild, target: Target, still_wanted: Callable[[], None]) -> None:
        self._rebuild = rebuild
        self._target = target
        self._still_wanted = still_wanted
        self._digests = node_digests(rebuild.seals[rebuild.position])

    def collect(self, shares: Sequence[Share], survivor: tuple[str, str] | None) -> None:
        left = dict.fromkeys(shares, 0)  # cells that are there
        if survivor is not None:
            try:
                self._from(survivor[1], left)
            except (CkptdError, ValueError) as error:
                log.warning("node %s cannot decode its share: %s", survivor[0], error)
        for share, done in left.items():
            for first, count in _blocks(share.first + done, share.cells - done):
                self._still_wanted()
                cells = self._rebuild.cells(share.chunk, first, count)
                self._target.write_cells(self._first_of(share.chunk) + first, cells)

    def _from(self, address: str, left: dict[Share, int]) -> None:
        """Takes shares in; notes how far it came."""
        rebuild = self._rebuild
        connection = Connection.open(address, rebuild.timeout_s)
        try:
            for share in left:  # all at once: the survivor goes on while we receive
                connection.send(self._request(share))
            for share in left:
                for first, count in _blocks(share.first, share.cells):
                    self._still_wanted()
                    answer = connection.answer()
                    if answer.payload_bytes != count * CELL_BYTES:
                        raise CorruptImage(
                            "cells of another length", f"{answer.payload_bytes} bytes for {count} cells"
                        )
                    self._receive(connection, share.chunk, first, count)
                    left[share] += count
        finally:
            connection.close()

    def _receive(self, connection: Connection, chunk: int, first: int, count: int) -> None:
        at = self._first_of(chunk) + first
        # Verified while they are in the cache, and then written: a page that is written as a whole
        # is not zeroed first, as one is that bytes are received into.
        (block,) = blocks(1)
        cells = block[: count * CELL_BYTES]
        connection.receive_into(cells)
        if mismatches(cells, self._digests[at * DIGEST_BYTES : (at + count) * DIGEST_BYTES]):
            raise CorruptImage(
                f"chunk {chunk} came with other bytes than were sealed", f"cells from {first} on"
            )
        self._target.write_cells(at, cells)
        self._rebuild.count(count * CELL_BYTES)

    def _request(self, share: Share) -> bulk_pb2.BulkHeader:
        rebuild = self._rebuild
        generation, step = rebuild.snapshot
        decode = bulk_pb2.Decode(
            snapshot_generation=generation,
            step=step,
            lost=rebuild.position,
            chunk=share.chunk,
            first_cell=share.first,
            cells=share.cells,
            chunk_bytes=rebuild.chunk_bytes,
            survivors=[bulk_pb2.Survivor(position=p, bulk_address=a) for p, a in rebuild.sources],
        )
        return bulk_pb2.BulkHeader(header=rebuild.header, sender=rebuild.sender, decode=decode)

    def _first_of(self, chunk: int) -> int:
        return chunk * self._rebuild.chunk_bytes // CELL_BYTES


def _blocks(first: int, cells: int) -> Iterator[tuple[int, int]]:
    """(first, count) of pieces that are received, verified and counted as one."""
    for at in range(first, first + cells, BLOCK_CELLS):
        yield at, min(BLOCK_CELLS, first + cells - at)
