"""Reads runs of bytes out of one stored file: each block once, verified before any byte of it is passed on.

A block goes into a staging buffer that stays in the cache of the core, is digested there, and what is wanted
of it is copied to its targets.  So unverified bytes never reach a target, at little more than the cost
of a plain read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ckptd.errors import CorruptCheckpoint
from ckptd.image.digest import DIGEST_BYTES, mismatches
from ckptd.image.digest_table import BLOCK_BYTES
from ckptd.layout import boxes
from ckptd.storage.store import Reader

CHUNK_BLOCKS: Final = 16  # read, digested and copied at a time: 1 MiB, which stay in a core's cache
CHUNK_BYTES: Final = CHUNK_BLOCKS * BLOCK_BYTES

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Pieces:
    """n pieces of one file: row r < rows[i] is `length[i]` bytes from `start[i] + r * step[i]` on, and
    goes to
    `target_start[i] + r * target_step[i]` of `targets[target[i]]`.

    Invariant: the rows of a piece do not overlap (step >= length where there are several).
    """

    start: Ints
    step: Ints
    rows: Ints
    length: Ints
    target: Ints
    target_start: Ints
    target_step: Ints

    def __len__(self) -> int:
        return len(self.start)

    @property
    def nbytes(self) -> int:
        return int((self.rows * self.length).sum())

    @property
    def end(self) -> Ints:
        """[n]: where the last row ends."""
        return self.start + (self.rows - 1) * self.step + self.length


@dataclass(frozen=True)
class Schedule:
    """Which blocks of a file are read, in chunks, and which pieces each chunk serves."""

    pieces: Pieces
    begin: Ints  # [m]: first byte of each chunk
    end: Ints  # [m]: behind its last byte
    served: Ints  # indices of pieces, chunk after chunk
    served_from: Ints  # [m + 1]: where each chunk's begin in `served`

    @property
    def read_bytes(self) -> int:
        return int((self.end - self.begin).sum())

    def __len__(self) -> int:
        return len(self.begin)


def schedule(pieces: Pieces, file_bytes: int) -> Schedule:
    """Returns how to read `pieces` of a file: the blocks that they touch, each once, in order."""
    first, stop = _blocks(pieces)
    _, low, high = boxes.merge(np.zeros(len(first), np.int64), first, stop)
    counts = -(-(high - low) // CHUNK_BLOCKS)
    which = np.repeat(np.arange(len(low)), counts)
    begin = low[which] + boxes.spans(np.zeros(len(counts), np.int64), counts) * CHUNK_BLOCKS
    end = np.minimum(begin + CHUNK_BLOCKS, high[which])
    begin, end = begin * BLOCK_BYTES, np.minimum(end * BLOCK_BYTES, file_bytes)
    # A piece is served by all chunks between its first and its last byte.
    one = np.searchsorted(end, pieces.start, "right")
    behind = np.searchsorted(begin, pieces.end, "left")
    of = np.repeat(np.arange(len(pieces)), behind - one)
    chunk = boxes.spans(one, behind - one)
    order = np.argsort(chunk, kind="stable")
    served_from = np.searchsorted(chunk[order], np.arange(len(begin) + 1), "left")
    return Schedule(pieces, begin, end, of[order], served_from)


def _blocks(pieces: Pieces) -> tuple[Ints, Ints]:
    """First and last (exclusive) block of every row, or of a whole piece whose gaps hide no block."""
    dense = (pieces.rows == 1) | (pieces.step - pieces.length < BLOCK_BYTES)
    wide = np.flatnonzero(~dense)
    which = np.repeat(wide, pieces.rows[wide])
    row = boxes.spans(np.zeros(len(wide), np.int64), pieces.rows[wide])
    begin = np.concatenate([pieces.start[dense], pieces.start[which] + row * pieces.step[which]])
    end = np.concatenate([pieces.end[dense], begin[int(dense.sum()) :] + pieces.length[which]])
    return begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)


class Staging:
    """One thread's buffer."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(CHUNK_BYTES))
        self.bytes: Bytes = np.frombuffer(self.view, np.uint8)


Load = Callable[[int, memoryview], None]  # fills with verified bytes from a multiple of the block on


def read_chunks(plan: Schedule, chunks: range, load: Load, targets: list[Bytes], staging: Staging) -> None:
    """Reads some chunks of a schedule, and copies what the targets want of them.

    Args:
        load: raises before it returns unverified bytes.
    """
    for chunk in chunks:
        begin, end = int(plan.begin[chunk]), int(plan.end[chunk])
        load(begin, staging.view[: end - begin])
        for index in plan.served[plan.served_from[chunk] : plan.served_from[chunk + 1]].tolist():
            _copy(plan.pieces, index, begin, end, staging.bytes, targets)


def read_verified(reader: Reader, begin: int, into: memoryview, digests: bytes, name: str) -> None:
    """Fills `into` with whole blocks from byte `begin` on, a multiple of the block, and verifies them.

    Raises:
        CorruptCheckpoint: a block does not match its digest, or the file ends before.
    """
    reader.read_into(begin, into)
    first = begin // BLOCK_BYTES
    count = -(-len(into) // BLOCK_BYTES)
    wrong = mismatches(into, digests[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES])
    if wrong:
        at = (first + wrong[0]) * BLOCK_BYTES
        raise CorruptCheckpoint(
            f"{name} is damaged",
            f"bytes {at} to {min(at + BLOCK_BYTES, begin + len(into))} do not match their digest",
            "use another checkpoint; ckptd verify lists everything that is damaged",
        )


def _copy(pieces: Pieces, index: int, begin: int, end: int, staging: Bytes, targets: list[Bytes]) -> None:
    """Copies the rows of one piece that lie in the chunk [begin, end)."""
    start, length = int(pieces.start[index]), int(pieces.length[index])
    target, at = targets[int(pieces.target[index])], int(pieces.target_start[index])
    rows = int(pieces.rows[index])
    if rows == 1:
        low, high = max(start, begin), min(start + length, end)
        if low < high:
            target[at + low - start : at + high - start] = staging[low - begin : high - begin]
        return
    step, target_step = int(pieces.step[index]), int(pieces.target_step[index])
    first = max(0, -(-(begin - start) // step))  # first row that begins in the chunk
    whole = min(rows, max(first, (end - length - start) // step + 1))  # behind the last one that ends in it
    if whole > first:
        _copy_rows(
            (whole - first, length),
            (staging, start + first * step - begin, step),
            (target, at + first * target_step, target_step),
        )
    for row in (first - 1, whole):  # the one that begins before the chunk, and the one that ends behind it
        if 0 <= row < rows:
            low, high = max(start + row * step, begin), min(start + row * step + length, end)
            if low < high:
                to = at + row * target_step + low - (start + row * step)
                target[to : to + high - low] = staging[low - begin : high - begin]


def _copy_rows(
    shape: tuple[int, int], source: tuple[Bytes, int, int], target: tuple[Bytes, int, int]
) -> None:
    """Copies (rows, length) bytes between (buffer, start, step), in words as wide as the geometry allows."""
    rows, length = shape
    geometry = length | source[1] | source[2] | target[1] | target[2] | target[0].ctypes.data
    width = next(w for w in (8, 4, 2, 1) if geometry % w == 0)
    word = np.dtype(f"u{width}")
    views = [
        np.ndarray((rows, length // width), word, buffer, start, (step, width))
        for buffer, start, step in (source, target)
    ]
    np.copyto(views[1], views[0])
