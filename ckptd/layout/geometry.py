"""Boxes of stored arrays, cut where the logical tensor jumps: views joined with the dimensions' runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from ckptd.layout.claims import Part
from ckptd.layout.runs import FILL_NAMES, Table, ragged
from ckptd.layout.tiles import Ints, Tiles


@dataclass(frozen=True)
class Views:
    """v boxes of one stored array at its places; its element 0 would be element `base` of what holds it."""

    place: Ints  # [v] index into the places of the tables
    base: Ints  # [v]
    low: Ints  # [v, d]
    high: Ints  # [v, d]


@dataclass(frozen=True)
class Boxes:
    """n boxes, each in one view: where it is in the summand, and in the stored array."""

    view: Ints  # [n]
    offsets: Ints  # [n, d] logical
    sizes: Ints  # [n, d]
    local: Ints  # [n, d] in the stored array
    summand: Ints  # [n, d] of each dimension, or the code of a fill


@dataclass(frozen=True)
class Filler:
    """A box of an array that holds padding: element (i, j, ...) of it is at start + i * strides[0] + ..."""

    array: str
    start: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    fill: str  # zero | last | none

    @property
    def length(self) -> int:
        return prod(self.sizes)


def whole(shapes: Ints) -> Views:
    """Every place's array whole, and by itself; `shapes` [m, d]."""
    places = np.arange(len(shapes), dtype=np.int64)
    return Views(places, np.zeros_like(places), np.zeros_like(shapes), shapes)


def local_shapes(tables: Sequence[Table], count: int) -> Ints:
    """[count, d]: the shape of the stored array at every place."""
    if not tables:
        return np.zeros((count, 0), np.int64)
    return np.stack([table.sizes[table.index] for table in tables], axis=1)


def row_major(shapes: Ints) -> Ints:
    """[m, d]: the strides, in elements, of arrays of these shapes."""
    strides = np.ones_like(shapes)
    for dim in range(shapes.shape[1] - 2, -1, -1):
        strides[:, dim] = strides[:, dim + 1] * np.maximum(shapes[:, dim + 1], 1)
    return strides


def pick(table: Table, index: int) -> Table:
    """Only the one entry with this logical index."""
    rows = (table.start <= index) & (index < table.start + table.length) & (table.summand >= 0)
    kept = table.keep(rows)
    return replace(
        kept,
        start=np.zeros_like(kept.start),
        length=np.ones_like(kept.length),
        local=kept.local + index - kept.start,
    )


def cut(tables: Sequence[Table], views: Views) -> Boxes:
    """The views' boxes, one for each combination of the dimensions' runs that they touch, row-major."""
    count, dims = len(views.place), len(tables)
    first, touched = np.zeros((count, dims), np.int64), np.zeros((count, dims), np.int64)
    for dim, table in enumerate(tables):
        first[:, dim], touched[:, dim] = _touched(table, views.place, views.low[:, dim], views.high[:, dim])
    view, rest = ragged(np.prod(touched, axis=1, dtype=np.int64))
    boxes = [np.zeros((len(view), dims), np.int64) for _ in range(4)]
    for dim in range(dims - 1, -1, -1):
        table, many = tables[dim], touched[view, dim]
        row = first[view, dim] + rest % many
        rest = rest // many
        low = np.maximum(table.local[row], views.low[view, dim])
        high = np.minimum(table.local[row] + table.length[row], views.high[view, dim])
        filler = table.summand[row] < 0
        values = (
            np.where(filler, 0, table.start[row] + low - table.local[row]),
            high - low,
            low,
            table.summand[row],
        )
        for column, value in zip(boxes, values, strict=True):
            column[:, dim] = value
    return Boxes(view, *boxes)


def narrowed(tables: Sequence[Table], part: Part) -> list[Table]:
    """The tables' rows that belong to one part."""
    picks, rest, found = dict(part.picks), part.label, []
    for dim in range(len(tables) - 1, -1, -1):
        rest, label = divmod(rest, len(tables[dim].labels))
        mine = tables[dim].at(label)
        found.append(pick(mine, picks[dim]) if dim in picks else mine)
    return found[::-1]


def made(
    shape: tuple[int, ...],
    part: Part,
    boxes: Boxes,
    base: Ints,
    place: Ints,
    ranks: Ints,
    shapes: Ints,
    covers: Ints,
    array: Ints,
    arrays: tuple[str, ...],
) -> Tiles:
    """Tiles of cut boxes: `base` and `place` per box, `shapes`, `covers` and `array` per rank."""
    strides = row_major(shapes)[place]
    picked = [dim for dim, _ in part.picks]
    kept = [dim for dim in range(shapes.shape[1]) if dim not in picked]
    if part.transposed:
        kept.reverse()
    return Tiles(
        shape,
        boxes.offsets[:, kept],
        boxes.sizes[:, kept],
        ranks[place],
        array[place],
        base + (boxes.local * strides).sum(axis=1),
        strides[:, kept],
        covers[place],
        arrays,
    )


def fillers_of(name: str, tables: Sequence[Table], views: Views, shapes: Ints) -> list[Filler]:
    """The filler in these views, as boxes of the array called `name`."""
    if not any((t.summand < 0).any() for t in tables):
        return []
    boxes = cut(tables, views)
    strides = row_major(shapes)[views.place[boxes.view]]
    start = views.base[boxes.view] + (boxes.local * strides).sum(axis=1)
    found = []
    for row in np.flatnonzero((boxes.summand < 0).any(axis=1)):
        fill = FILL_NAMES[int(boxes.summand[row][boxes.summand[row] < 0][0])]
        sizes, steps = _joined(boxes.sizes[row].tolist(), strides[row].tolist())
        found.append(Filler(name, int(start[row]), sizes, steps, fill))
    return found


def _joined(sizes: list[int], strides: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Fewer dimensions: those that go on through the next one are one."""
    out: list[tuple[int, int]] = []
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1 and out:
            continue
        if out and stride == out[-1][0] * out[-1][1]:
            out[-1] = (out[-1][0] * size, out[-1][1])
        else:
            out.append((size, stride))
    return tuple(size for size, _ in reversed(out)), tuple(stride for _, stride in reversed(out))


def _touched(table: Table, place: Ints, low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """(first row, number of rows) of a table that overlap [low, high) at these places."""
    sequence = table.index[place]
    wide = int(max(table.sizes.max(initial=0), high.max(initial=0))) + 1
    key = np.repeat(np.arange(len(table.sizes), dtype=np.int64), np.diff(table.ptr)) * wide + table.local
    begin = np.searchsorted(key + table.length, sequence * wide + low, side="right")
    end = np.searchsorted(key, sequence * wide + high, side="left")
    return begin, np.where(low < high, np.maximum(end - begin, 0), 0)
