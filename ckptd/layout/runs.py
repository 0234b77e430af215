"""What an axis expression means: at every coordinate, an ordered sequence of runs.

A sequence says, index by index of the stored dimension, which logical index lies there or that it is filler.
Every constructor is one small operation on sequences:

    Extent n        0 .. n - 1
    Sum             the summands one after another, each with logical indices of its own
    Product a b     for every entry of a, all of b; the logical index is row-major over the factors' whole
    extents Split x@grid    a consecutive share of the sequence of x
    Pad x^n         filler after the sequence of x, up to a multiple of n

So the local indices are consecutive by construction, and `({gate,up} f@tp)@dp` is the split over dp of what a
tp rank has.  Sequences are kept as runs; the cost follows their number, not the number of elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ckptd.errors import LayoutRefused
from ckptd.layout.arithmetic import evaluate as number
from ckptd.layout.arithmetic import show
from ckptd.layout.distinct import numbered
from ckptd.layout.expressions import Axis, Extent, Pad, Product, Split, Sum
from ckptd.layout.tiles import Ints

# A filler run's summand is one of these; the fill's name is what may be written there.
FILLS = {"zero": -1, "last": -2, "none": -3}
FILL_NAMES = {code: name for name, code in FILLS.items()}


@dataclass(frozen=True)
class Runs:
    """One coordinate's sequence: k runs, one after another in the stored dimension; none is empty."""

    labels: tuple[str, ...]  # the summands, in the order of the rule's pieces
    extents: tuple[int, ...]  # logical indices of each summand over all coordinates
    summand: Ints  # [k] index into `labels`, or a code of FILLS
    start: Ints  # [k] first logical index; 0 for filler
    length: Ints  # [k]

    @property
    def size(self) -> int:
        """Indices of the stored dimension."""
        return int(self.length.sum())

    @property
    def local(self) -> Ints:
        """[k]: where each run begins in the stored dimension."""
        return np.cumsum(self.length) - self.length


@dataclass(frozen=True)
class Table:
    """The sequences of m places, equal ones once: place i has rows ptr[index[i]] .. ptr[index[i] + 1]."""

    labels: tuple[str, ...]
    extents: tuple[int, ...]
    index: Ints  # [m]
    ptr: Ints  # [c + 1]
    sizes: Ints  # [c] indices of the stored dimension
    summand: Ints  # [k]
    start: Ints  # [k]
    length: Ints  # [k]
    local: Ints  # [k] within its sequence

    def at(self, summand: int) -> Table:
        """Only one summand's rows; the local positions stay."""
        return self.keep(self.summand == summand)

    def filler(self) -> Table:
        """Only the filler."""
        return self.keep(self.summand < 0)

    def keep(self, kept: NDArray[np.bool_]) -> Table:
        """Only these rows; the local positions stay."""
        before = np.concatenate(([0], np.cumsum(kept)))
        rows = (self.summand[kept], self.start[kept], self.length[kept], self.local[kept])
        return Table(self.labels, self.extents, self.index, before[self.ptr], self.sizes, *rows)


def evaluate(axis: Axis, values: Mapping[str, int], coordinates: Mapping[str, int]) -> Runs:
    """The sequence of a stored dimension at one place.

    Args:
        axis: the expression.
        values: every name's value: parameters, `let`s, and the sizes of all mesh axes.
        coordinates: the place's on the mesh axes.  An axis of a grid that has a value but no coordinate is
        the
            place's own: it holds the shares of all its indices, one after another.

    Raises: LayoutRefused: a name without value, a negative extent, shares that do not add up, a summand
    twice.
    """
    if isinstance(axis, Extent):
        return _extent(axis, values)
    if isinstance(axis, Sum):
        return _sum(axis, values)
    if isinstance(axis, Product):
        if not axis.factors:
            return _runs(("",), (1,), [0], [0], [1])
        return reduce(_times, (evaluate(factor, values, coordinates) for factor in axis.factors))
    if isinstance(axis, Pad):
        return _pad(axis, evaluate(axis.axis, values, coordinates), values)
    return _split(axis, evaluate(axis.axis, values, coordinates), values, coordinates)


def grid_axes(axis: Axis) -> tuple[str, ...]:
    """Every axis that a split of this expression names, in order, each once."""
    if isinstance(axis, Split):
        return tuple(dict.fromkeys((*grid_axes(axis.axis), *axis.grid)))
    if isinstance(axis, Pad):
        return grid_axes(axis.axis)
    if isinstance(axis, Product):
        return tuple(dict.fromkeys(name for factor in axis.factors for name in grid_axes(factor)))
    return ()


def table(axis: Axis, values: Mapping[str, int], columns: Mapping[str, Ints], count: int) -> Table:
    """The sequences at `count` places, given their coordinates; `evaluate` for many, each coordinate once.

    Args:
        columns: mesh axis -> [count] coordinates.
        count: at least one.

    Raises: LayoutRefused: as `evaluate`.
    """
    assert count > 0
    own = [name for name in grid_axes(axis) if name in columns]
    key = np.zeros(count, np.int64)
    for name in own:
        key = key * values[name] + columns[name]
    _, first, index = numbered(key)
    index = index.reshape(-1)
    chosen = {name: columns[name][first] for name in own}
    if isinstance(axis, Split) and all(name in columns for name in axis.grid):
        return _cut(axis, table(axis.axis, values, chosen, len(first)), values, chosen, index)
    rows = np.stack(list(chosen.values()), axis=1).tolist() if chosen else [[]]
    found = [evaluate(axis, values, dict(zip(chosen, row, strict=True))) for row in rows]
    return Table(
        found[0].labels,
        found[0].extents,
        index,
        np.cumsum([0] + [len(runs.length) for runs in found]),
        np.array([runs.size for runs in found], np.int64),
        *(
            np.concatenate([getattr(runs, part) for runs in found])
            for part in ("summand", "start", "length", "local")
        ),
    )


def ragged(count: Ints) -> tuple[Ints, Ints]:
    """For count[i] things of each i: (owner, number within the owner), both [sum(count)]."""
    owner = np.repeat(np.arange(len(count), dtype=np.int64), count)
    return owner, np.arange(len(owner), dtype=np.int64) - (np.cumsum(count) - count)[owner]


def shares(size: Ints, ranks: int, share: Ints) -> tuple[Ints, Ints]:
    """torch.chunk's rule: (begin, end) of each share of sequences of these sizes; the last may be short."""
    width = -(-size // ranks)
    return np.minimum(share * width, size), np.minimum((share + 1) * width, size)


# --- constructors --------------------------------------------------------------------------------


def _runs(
    labels: tuple[str, ...],
    extents: tuple[int, ...],
    summand: Ints | Sequence[int],
    start: Ints | Sequence[int],
    length: Ints | Sequence[int],
) -> Runs:
    """Empty runs dropped, and neighbours that go on joined."""
    a, b, c = (np.asarray(values, np.int64) for values in (summand, start, length))
    kept = c > 0
    a, b, c = a[kept], b[kept], c[kept]
    if len(c) > 1:
        goes_on = (a[1:] == a[:-1]) & ((a[1:] < 0) | (b[1:] == b[:-1] + c[:-1]))
        head = np.flatnonzero(np.concatenate(([True], ~goes_on)))
        a, b, c = a[head], b[head], np.add.reduceat(c, head)
    return Runs(labels, extents, a, np.where(a < 0, 0, b), c)


def _extent(axis: Extent, values: Mapping[str, int]) -> Runs:
    size = number(axis.size, values)
    if size < 0:
        raise LayoutRefused(f"an extent is negative: {show(axis.size)} = {size}")
    return _runs(("",), (size,), [0], [0], [size])


def _sum(axis: Sum, values: Mapping[str, int]) -> Runs:
    labels = tuple(label for label, _ in axis.parts)
    if len(set(labels)) != len(labels):
        raise LayoutRefused(f"a sum names a part twice: {{{', '.join(labels)}}}")
    sizes = tuple(number(size, values) for _, size in axis.parts)
    if min(sizes, default=0) < 0:
        raise LayoutRefused(f"a part of the sum {{{', '.join(labels)}}} has a negative size: {sizes}")
    return _runs(labels, sizes, range(len(sizes)), [0] * len(sizes), sizes)


def _times(left: Runs, right: Runs) -> Runs:
    """For every entry of `left`, all of `right`."""
    labels = tuple(".".join(filter(None, pair)) for pair in product(left.labels, right.labels))
    extents = tuple(a * b for a, b in product(left.extents, right.extents))
    if len(right.labels) == 1 and list(right.length) == [right.extents[0]] and right.summand[0] == 0:
        # The right is whole, so that a run of the left goes on through it.
        whole = right.extents[0]
        return _runs(labels, extents, left.summand, left.start * whole, left.length * whole)
    row, within = ragged(left.length)
    summand, start = left.summand[row][:, None], (left.start[row] + within)[:, None]
    theirs = right.summand[None, :]
    both = np.where(summand < 0, summand, np.where(theirs < 0, theirs, summand * len(right.labels) + theirs))
    whole_extents = np.array([*right.extents, 0], np.int64)[np.maximum(theirs, -1)]
    begins = start * whole_extents + right.start[None, :]
    lengths = np.broadcast_to(right.length[None, :], both.shape)
    return _runs(labels, extents, both.ravel(), begins.ravel(), lengths.ravel())


def _pad(axis: Pad, inner: Runs, values: Mapping[str, int]) -> Runs:
    multiple = number(axis.multiple, values)
    if multiple < 1:
        raise LayoutRefused(f"padding to a multiple of {show(axis.multiple)} = {multiple}")
    filler = -inner.size % multiple
    return _runs(
        inner.labels,
        inner.extents,
        np.append(inner.summand, FILLS[axis.fill]),
        np.append(inner.start, 0),
        np.append(inner.length, filler),
    )


def _split(axis: Split, inner: Runs, values: Mapping[str, int], coordinates: Mapping[str, int]) -> Runs:
    """The shares of this place: one, or those of all indices of the grid's axes that are its own."""
    indices, stride = [0], 1
    for name in axis.grid:
        size = _grid_size(axis, name, values)
        own = [coordinates[name]] if name in coordinates else range(size)
        indices = [index + stride * coordinate for index, coordinate in product(indices, own)]
        stride *= size
    begin, end = _bounds(axis, np.array([inner.size]), stride, np.sort(np.array(indices, np.int64)))
    local = inner.local
    low = np.maximum(local[None, :], begin[:, None])
    length = np.maximum(np.minimum((local + inner.length)[None, :], end[:, None]) - low, 0)
    starts = inner.start[None, :] + low - local[None, :]
    summand = np.broadcast_to(inner.summand[None, :], length.shape)
    return _runs(inner.labels, inner.extents, summand.ravel(), starts.ravel(), length.ravel())


def _cut(
    axis: Split, inner: Table, values: Mapping[str, int], columns: Mapping[str, Ints], index: Ints
) -> Table:
    """`_split` for all places at once: every share is found in the inner sequences by binary search."""
    share, ranks = np.zeros(len(inner.index), np.int64), 1
    for name in axis.grid:
        share += columns[name] * ranks
        ranks *= _grid_size(axis, name, values)
    sequence = inner.index
    size = inner.sizes[sequence]
    begin, end = _bounds(axis, size, ranks, share)
    wide = int(inner.sizes.max(initial=0)) + 1
    key = np.repeat(np.arange(len(inner.sizes)), np.diff(inner.ptr)) * wide + inner.local
    first = np.searchsorted(key + inner.length, sequence * wide + begin, side="right")
    last = np.maximum(np.searchsorted(key, sequence * wide + end, side="left"), first)
    first, last = np.where(begin < end, first, 0), np.where(begin < end, last, 0)
    owner, within = ragged(last - first)
    row = first[owner] + within
    low = np.maximum(inner.local[row], begin[owner])
    high = np.minimum(inner.local[row] + inner.length[row], end[owner])
    return Table(
        inner.labels,
        inner.extents,
        index,
        np.concatenate(([0], np.cumsum(last - first))),
        end - begin,
        inner.summand[row],
        np.where(inner.summand[row] < 0, 0, inner.start[row] + low - inner.local[row]),
        high - low,
        low - begin[owner],
    )


def _bounds(axis: Split, size: Ints, ranks: int, share: Ints) -> tuple[Ints, Ints]:
    """(begin, end) of each share, by the split's widths or by torch.chunk's rule."""
    if axis.widths is None:
        return shares(size, ranks, share)
    if len(axis.widths) != ranks:
        raise LayoutRefused(
            f"a split over {' * '.join(axis.grid)} has {ranks} ranks and {len(axis.widths)} widths"
        )
    if min(axis.widths) < 0 or (size != sum(axis.widths)).any():
        raise LayoutRefused(
            f"widths {list(axis.widths)} of a split over {' * '.join(axis.grid)} add up to "
            f"{sum(axis.widths)}, and there are {int(size.ravel()[0])} indices",
            next="give widths that add up",
        )
    bounds = np.concatenate(([0], np.cumsum(axis.widths)))
    return bounds[share], bounds[share + 1]


def _grid_size(axis: Split, name: str, values: Mapping[str, int]) -> int:
    if name not in values:
        raise LayoutRefused(
            f"a split over {' * '.join(axis.grid)}: {name} is no axis of the mesh and no parameter",
            next=f"known here: {', '.join(sorted(values))}",
        )
    return values[name]
