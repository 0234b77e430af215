"""Byte runs: what a plan's copies are as bytes of arrays and files; merged, counted, rounded to blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ckptd.layout import boxes
from ckptd.layout.distinct import distinct_rows

if TYPE_CHECKING:
    from ckptd.layout.plan import Copies

Ints = NDArray[np.int64]
Locate = Callable[[Ints, Ints], tuple[Ints, Ints]]


@dataclass(frozen=True)
class Runs:
    """n runs, each repeated over a grid of k dimensions; all starts, steps and lengths are bytes.

    Run i stands for `prod(repeats[i])` runs of `length[i]` bytes: the one at index r of the grid is read at
    `source_start[i] + sum(r * source_steps[i])` and written at `target_start[i] + sum(r * target_steps[i])`.
    """

    source_place: Ints  # [n]
    source_array: Ints  # [n], an index into `source_arrays`
    source_start: Ints  # [n]
    source_steps: Ints  # [n, k]
    target_place: Ints  # [n]
    target_array: Ints  # [n], an index into `target_arrays`
    target_start: Ints  # [n]
    target_steps: Ints  # [n, k]
    length: Ints  # [n], never 0
    repeats: Ints  # [n, k], at least 1
    source_arrays: tuple[str, ...]
    target_arrays: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.length)

    @property
    def counts(self) -> Ints:
        """[n]: how many runs each stands for."""
        return boxes.volume(self.repeats)

    @property
    def bytes(self) -> int:
        return int(np.sum(self.counts * self.length))

    def at(self, chosen: NDArray[np.bool_] | Ints) -> Runs:
        """The runs that a mask or an index selects."""
        return Runs(
            self.source_place[chosen],
            self.source_array[chosen],
            self.source_start[chosen],
            self.source_steps[chosen],
            self.target_place[chosen],
            self.target_array[chosen],
            self.target_start[chosen],
            self.target_steps[chosen],
            self.length[chosen],
            self.repeats[chosen],
            self.source_arrays,
            self.target_arrays,
        )

    def expanded(self) -> Runs:
        """The same without repeats (k is 0): every run by itself, in the order of the target, merged."""
        which, index = _grid(self.repeats)
        plain = self.at(which)
        empty = np.zeros((len(which), 0), np.int64)
        return _merged(
            replace(
                plain,
                source_start=plain.source_start + np.sum(index * plain.source_steps, axis=1),
                target_start=plain.target_start + np.sum(index * plain.target_steps, axis=1),
                source_steps=empty,
                target_steps=empty,
                repeats=empty,
            )
        )


def runs(copies: Copies, itemsize: int) -> Runs:
    """The copies as bytes: what goes on from one another on both sides is one run, as are neighbours."""
    sizes, source, target = canonical(copies)
    found = Runs(
        copies.source_place,
        copies.source_array,
        copies.source_start * itemsize,
        source[:, :-1] * itemsize,
        copies.target_place,
        copies.target_array,
        copies.target_start * itemsize,
        target[:, :-1] * itemsize,
        sizes[:, -1] * itemsize,
        sizes[:, :-1],
        copies.source_arrays,
        copies.target_arrays,
    )
    single = found.counts == 1
    merged = _merged(found.at(single))
    return join([merged, found.at(~single)]) if not single.all() else merged


def canonical(copies: Copies) -> tuple[Ints, Ints, Ints]:
    """(sizes, source strides, target strides), each [n, k + 1], in elements, in as few dimensions as can be.

    The last dimension is contiguous on both sides (its strides are 1, its size may be 1); the others run from
    the greatest target stride to the least, so that a copy writes forwards.
    """
    count, dims = copies.sizes.shape
    trivial = copies.sizes == 1
    order = np.argsort(
        np.where(trivial, np.iinfo(np.int64).min, -copies.target_strides), axis=1, kind="stable"
    )
    sizes = np.take_along_axis(copies.sizes, order, axis=1)
    source = np.take_along_axis(copies.source_strides, order, axis=1)
    target = np.take_along_axis(copies.target_strides, order, axis=1)
    # Columns are filled from the last to the first; `top` is the one that each copy is filling.
    out = np.ones((3, count, dims + 1), np.int64)
    out[1:, :, :-1] = 0
    rows, top = np.arange(count), np.full(count, dims)
    for dim in reversed(range(dims)):
        extent, *strides = out[:, rows, top]
        real = sizes[:, dim] > 1
        goes_on = (source[:, dim] == extent * strides[0]) & (target[:, dim] == extent * strides[1])
        out[0, rows[real & goes_on], top[real & goes_on]] *= sizes[real & goes_on, dim]
        new = real & ~goes_on
        top[new] -= 1
        out[:, rows[new], top[new]] = sizes[new, dim], source[new, dim], target[new, dim]
    first = int(top.min()) if count else dims
    return out[0, :, first:], out[1, :, first:], out[2, :, first:]


def join(parts: list[Runs]) -> Runs:
    """Runs of several tensors as one value; arrays of the same name are the same array.

    Neighbours in a flat buffer that came from different tensors are merged.
    """
    depth = max((part.repeats.shape[1] for part in parts), default=0)
    sources: dict[str, int] = {}
    targets: dict[str, int] = {}
    columns: list[list[Ints]] = [[] for _ in range(10)]
    for part in parts:
        source_ids = np.array(
            [sources.setdefault(name, len(sources)) for name in part.source_arrays], np.int64
        )
        target_ids = np.array(
            [targets.setdefault(name, len(targets)) for name in part.target_arrays], np.int64
        )
        values = (
            part.source_place,
            source_ids[part.source_array],
            part.source_start,
            _widened(part.source_steps, depth, 0),
            part.target_place,
            target_ids[part.target_array],
            part.target_start,
            _widened(part.target_steps, depth, 0),
            part.length,
            _widened(part.repeats, depth, 1),
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    if not parts:
        none, wide = np.zeros(0, np.int64), np.zeros((0, 0), np.int64)
        return Runs(none, none, none, wide, none, none, none, wide, none, wide, (), ())
    c = [np.concatenate(column) for column in columns]
    arrays = tuple(sources), tuple(targets)
    return _merged(Runs(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], *arrays))


def _widened(values: Ints, depth: int, fill: int) -> Ints:
    extra = np.full((len(values), depth - values.shape[1]), fill, np.int64)
    return np.concatenate([extra, values], axis=1)


def _merged(found: Runs) -> Runs:
    """In the order of the target; single runs that follow each other on both sides are one."""
    order = np.lexsort((found.target_start, found.target_array, found.target_place))
    found = found.at(order)
    if len(found) < 2:
        return found
    single = found.counts == 1
    goes_on = single[1:] & single[:-1]
    for key in (found.source_place, found.source_array, found.target_place, found.target_array):
        goes_on &= key[1:] == key[:-1]
    for start in (found.source_start, found.target_start):
        goes_on &= start[:-1] + found.length[:-1] == start[1:]
    first = np.flatnonzero(np.concatenate([[True], ~goes_on]))
    return replace(found.at(first), length=np.add.reduceat(found.length, first))


def _grid(repeats: Ints) -> tuple[Ints, Ints]:
    """All indices of n grids [n, k], row-major: (which grid [m], index [m, k])."""
    counts = boxes.volume(repeats)
    which = np.repeat(np.arange(len(repeats)), counts)
    rest = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    index = np.zeros((len(which), repeats.shape[1]), np.int64)
    for dim in reversed(range(repeats.shape[1])):
        size = repeats[which, dim]
        index[:, dim] = rest % size
        rest //= size
    return which, index


@dataclass(frozen=True)
class Blocks:
    """The blocks that reads touch, each once: ranges [first, stop) of block numbers per object, sorted."""

    object: Ints  # [m]
    first: Ints  # [m]
    stop: Ints  # [m]
    block_bytes: int
    needed_bytes: int  # a piece that several targets want counts once

    @property
    def read_bytes(self) -> int:
        """As if every object ended with a whole block."""
        return int(np.sum(self.stop - self.first)) * self.block_bytes

    @property
    def amplification(self) -> float:
        """Bytes read for each byte needed; 1.0 where nothing is needed."""
        return self.read_bytes / self.needed_bytes if self.needed_bytes else 1.0


def blocks(found: Runs, block_bytes: int = 65536, locate: Locate | None = None) -> Blocks:
    """The blocks of the sources that hold all these runs.

    Args:
        locate: (places [n], arrays [n]) -> (objects [n], bytes [n]): the file in which an array of a place
            lies, and where it begins there.  By default each array is an object of its own, numbered
            `place * len(source_arrays) + array`.
    """
    found = _distinct_sources(found)
    if locate is None:
        which, base = (
            found.source_place * max(len(found.source_arrays), 1) + found.source_array,
            0 * found.length,
        )
    else:
        which, base = locate(found.source_place, found.source_array)
    repeats, steps = found.repeats.copy(), found.source_steps
    start, length = base + found.source_start, found.length.copy()
    # Gaps shorter than a block hold no whole block: such a repetition touches all blocks from begin to end.
    for dim in reversed(range(repeats.shape[1])):
        dense = (steps[:, dim] >= 0) & (steps[:, dim] - length < block_bytes)
        dense &= np.all(repeats[:, dim + 1 :] == 1, axis=1)
        length += np.where(dense, (repeats[:, dim] - 1) * steps[:, dim], 0)
        repeats[dense, dim] = 1
    run, index = _grid(repeats)
    begin = start[run] + np.sum(index * steps[run], axis=1)
    low, high = begin // block_bytes, -(-(begin + length[run]) // block_bytes)
    return Blocks(*boxes.merge(which[run], low, high), block_bytes, found.bytes)


def _distinct_sources(found: Runs) -> Runs:
    rows = np.column_stack(
        [
            found.source_place,
            found.source_array,
            found.source_start,
            found.length,
            found.source_steps,
            found.repeats,
        ]
    )
    return found.at(distinct_rows(rows)[1]) if len(rows) else found


@dataclass(frozen=True)
class Summary:
    """What a plan costs; printed by `ckptd` before it is carried out."""

    bytes: int  # moved in all
    local_bytes: int  # of them, within one place
    copies: int
    runs: int
    median_run_bytes: int  # half of the runs are at least this long
    amplification: float | None  # bytes read per byte needed, if blocks were asked for

    def __str__(self) -> str:
        read = "" if self.amplification is None else f", reads {self.amplification:.3f} x the bytes needed"
        return (
            f"{self.bytes:,} bytes ({self.local_bytes:,} of them in place) in {self.copies:,} copies of "
            f"{self.runs:,} runs, median {self.median_run_bytes:,} bytes{read}"
        )


def summarise(parts: list[tuple[Runs, int, int]], block_bytes: int | None = None) -> Summary:
    """The costs of (runs, copies they came from, times they occur); each array is an object of its own."""
    total = local = made = read = needed = 0
    for found, copies, times in parts:
        sizes = found.counts * found.length
        total += times * int(np.sum(sizes))
        local += times * int(np.sum(sizes[found.source_place == found.target_place]))
        made += times * copies
        if block_bytes is not None:
            touched = blocks(found, block_bytes)
            read, needed = read + times * touched.read_bytes, needed + times * touched.needed_bytes
    lengths = np.concatenate([np.zeros(0, np.int64), *(found.length for found, _, _ in parts)])
    counts = np.concatenate([np.zeros(0, np.int64), *(found.counts * times for found, _, times in parts)])
    order = np.argsort(lengths)
    number = int(np.sum(counts))
    middle = np.searchsorted(np.cumsum(counts[order]), (number + 1) // 2)
    return Summary(
        total,
        local,
        made,
        number,
        int(lengths[order][middle]) if number else 0,
        None if block_bytes is None else (read / needed if needed else 1.0),
    )
