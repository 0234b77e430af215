"""Boxes of indices: n boxes with d dimensions are two arrays [n, d], offsets and sizes (int64, elements).

Everything here is vectorised; the cost is near the size of the result for tilings that are grids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from ckptd.layout.distinct import distinct, numbered

Ints = NDArray[np.int64]


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous array of this shape."""
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= size
    return tuple(reversed(strides))


def volume(sizes: Ints) -> Ints:
    """[n]: elements in each box of `sizes` [n, d]; a box without dimensions has one."""
    found: Ints = np.prod(sizes, axis=1, dtype=np.int64)
    return found


def intersect(offsets: Ints, sizes: Ints, other_offsets: Ints, other_sizes: Ints) -> tuple[Ints, Ints]:
    """Offsets and sizes of the common parts, pair by pair (arrays broadcast); where empty, a size is 0."""
    low = np.maximum(offsets, other_offsets)
    high = np.minimum(offsets + sizes, other_offsets + other_sizes)
    return low, np.maximum(high - low, 0)


def of_range(shape: Sequence[int], low: int, high: int) -> tuple[Ints, Ints]:
    """The flat range [low, high) of a row-major tensor as boxes (offsets, sizes), in order.

    At most 2d - 1 boxes, none empty; box after box, their elements in row-major order are the range.

    Raises:
        ValueError: the range is not within the tensor.
    """
    _, offsets, sizes = of_ranges(shape, np.array([low], np.int64), np.array([high], np.int64))
    return offsets, sizes


def of_ranges(shape: Sequence[int], low: Ints, high: Ints) -> tuple[Ints, Ints, Ints]:
    """`of_range` of many ranges [n]: (which range [m], offsets [m, d], sizes [m, d]), in order.

    Raises:
        ValueError: a range is not within the tensor.
    """
    dims, total = len(shape), prod(shape)
    if np.any((low < 0) | (low > high) | (high > total)):
        raise ValueError(f"a range is not within the {total} elements of shape {tuple(shape)}")
    if dims == 0 or total == 0:
        which = np.flatnonzero(low < high)
        return which, np.zeros((len(which), dims), np.int64), np.zeros((len(which), dims), np.int64)
    strides = row_major(shape)
    at = low.copy()
    found: list[tuple[Ints, Ints, Ints, int]] = []  # range, flat position, count of rows, dimension
    # Up to the next row of the dimension before, as long as there is one; then down again to single elements.
    for dim in [*range(dims - 1, 0, -1), *range(dims)]:
        reach = high - at
        if len(found) < dims - 1:
            reach = np.minimum(reach, -at % strides[dim - 1])
        count = reach // strides[dim]
        found.append((np.flatnonzero(count), at.copy(), count, dim))
        at += count * strides[dim]
    return _as_boxes(shape, strides, found)


def _as_boxes(
    shape: Sequence[int], strides: Sequence[int], found: list[tuple[Ints, Ints, Ints, int]]
) -> tuple[Ints, Ints, Ints]:
    which, flat, offsets, sizes = [], [], [], []
    for chosen, at, count, dim in found:
        start = at[chosen]
        box = np.stack([start // stride % size for stride, size in zip(strides, shape, strict=True)], axis=1)
        extent = np.tile(np.asarray(shape, np.int64), (len(chosen), 1))
        extent[:, :dim] = 1
        extent[:, dim] = count[chosen]
        which.append(chosen)
        flat.append(start)
        offsets.append(box)
        sizes.append(extent)
    order = np.lexsort((np.concatenate(flat), np.concatenate(which)))
    return np.concatenate(which)[order], np.concatenate(offsets)[order], np.concatenate(sizes)[order]


def subtract(
    offset: Sequence[int], size: Sequence[int], hole_offset: Sequence[int], hole_size: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """What is left of one box without another, as at most 2d disjoint boxes (offset, size)."""
    low = [max(a, b) for a, b in zip(offset, hole_offset, strict=True)]
    high = [min(a + n, b + m) for a, n, b, m in zip(offset, size, hole_offset, hole_size, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return [(tuple(offset), tuple(size))] if prod(size) else []
    left, begin, end = [], list(offset), [a + n for a, n in zip(offset, size, strict=True)]
    for dim in range(len(begin)):
        for cut_begin, cut_end in ((begin[dim], low[dim]), (high[dim], end[dim])):
            if cut_begin < cut_end:
                piece_begin = [*begin[:dim], cut_begin, *begin[dim + 1 :]]
                piece_end = [*end[:dim], cut_end, *end[dim + 1 :]]
                left.append(
                    (tuple(piece_begin), tuple(b - a for a, b in zip(piece_begin, piece_end, strict=True)))
                )
        begin[dim], end[dim] = low[dim], high[dim]
    return left


def pairs(low: Ints, high: Ints, other_low: Ints, other_high: Ints) -> tuple[Ints, Ints]:
    """Indices (i, j) of all pairs of boxes, one of each set, that have an element in common.

    Args:
        low, high: [n, k] and [m, k] bounds, half open; no box is empty. Equality of a key is one more
            dimension with bounds (key, key + 1).

    The second set becomes a tree, one level per dimension, that the first set descends at once: two searches
    per level find the range of a node's children that overlap.  No order of the pairs is promised.
    """
    if low.shape[1] == 0:
        first, second = np.meshgrid(np.arange(len(low)), np.arange(len(other_low)), indexing="ij")
        return first.ravel(), second.ravel()
    mine, node = (
        np.arange(len(low)),
        np.zeros(len(low), np.int64),
    )  # the pairs so far: a box, a node of the tree
    parent = np.zeros(len(other_low), np.int64)  # of each box of the second set: its node
    for dim in _most_selective_first(other_low, other_high):
        mine, node, parent = _descend(
            mine, node, parent, low[:, dim], high[:, dim], other_low[:, dim], other_high[:, dim]
        )
    # The leaves hold boxes that are equal in every dimension.
    order = np.argsort(parent, kind="stable")
    begin = np.searchsorted(parent[order], node, "left")
    count = np.searchsorted(parent[order], node, "right") - begin
    return np.repeat(mine, count), order[spans(begin, count)]


def _most_selective_first(low: Ints, high: Ints) -> list[int]:
    bounds = [len(distinct(low[:, dim])) + len(distinct(high[:, dim])) for dim in range(low.shape[1])]
    return sorted(range(low.shape[1]), key=lambda dim: -bounds[dim])


def _descend(
    mine: Ints, node: Ints, parent: Ints, low: Ints, high: Ints, other_low: Ints, other_high: Ints
) -> tuple[Ints, Ints, Ints]:
    """One level: the pairs whose intervals overlap here too, and the child node of each of the second set.

    Bounds are replaced by their ranks among the second set's, so that (node, bound) fits one integer.
    """
    bounds = distinct(np.concatenate([other_low, other_high]))
    begin, end = np.searchsorted(bounds, other_low), np.searchsorted(bounds, other_high)
    base = len(bounds) + 1
    assert len(parent) * base * base < 2**62, "too many boxes for one join"
    key, _, child = numbered((parent * base + begin) * base + end)
    child_begin, child_end = key // base, key % base
    # Within a parent, children are sorted by their begin; the running maximum of the ends is sorted too, so
    # that those before the first end beyond `low` do not overlap.  For tilings the rest up to `high` all do.
    reach = np.maximum.accumulate(child_begin // base * base + child_end)
    first = np.searchsorted(reach, node * base + np.searchsorted(bounds, low, "right")[mine], "left")
    last = np.searchsorted(child_begin, node * base + np.searchsorted(bounds, high, "left")[mine], "left")
    count = np.maximum(last - first, 0)
    found = spans(first, count)
    mine = np.repeat(mine, count)
    overlaps = bounds[child_end[found]] > low[mine]
    return mine[overlaps], found[overlaps], child.ravel()


def spans(begin: Ints, count: Ints) -> Ints:
    """begin[0], begin[0] + 1, ... `count[0]` of them, then those of begin[1], ..."""
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    found: Ints = np.arange(total) + np.repeat(begin - (ends - count), count)
    return found


@dataclass(frozen=True)
class Fault:
    """The first element that a tiling covers wrongly, and how many boxes hold it (0: a gap; 2: an overlap).

    Where `times` is not 0 and the point lies outside the tensor, a box reaches out of it.
    """

    group: int
    point: tuple[int, ...]
    times: int


def fault(shape: Sequence[int], offsets: Ints, sizes: Ints, group: Ints | None = None) -> Fault | None:
    """None if the boxes of every group tile the tensor exactly; otherwise where the first group does not.

    Exact and without any join (so identical boxes by the thousand cost nothing extra): a box's signed corners
    determine it, and the boxes tile the tensor if and only if their corners add up to the tensor's.  In
    lexicographic order, the first corner that is left over is the first element that is covered wrongly.
    For the proof that `Tiles` are exact: `fault(t.shape, t.offsets, t.sizes, t.cover)`.

    Args:
        offsets, sizes: [n, d]; empty boxes are ignored.
        group: [n], such as `Tiles.cover`; None is one group.  A group without boxes is not seen.
    """
    group = np.zeros(len(offsets), np.int64) if group is None else group
    labels = distinct(group)
    if len(labels) == 0:
        labels = np.zeros(1, np.int64)
    dims, whole = len(shape), np.asarray(shape, np.int64)
    full = int(prod(shape) > 0)
    kept = np.flatnonzero(volume(sizes) > 0)
    low = np.concatenate([offsets[kept], np.zeros((len(labels) * full, dims), np.int64)])
    high = np.concatenate([offsets[kept] + sizes[kept], np.tile(whole, (len(labels) * full, 1))])
    weight = np.concatenate([np.ones(len(kept), np.int64), -np.ones(len(labels) * full, np.int64)])
    label = np.concatenate([group[kept], np.repeat(labels, full)])
    points, signs = [], []
    for corner in np.ndindex(*(2,) * dims):
        points.append(
            np.column_stack([label, *(np.where(at, high[:, d], low[:, d]) for d, at in enumerate(corner))])
        )
        signs.append(weight * (-1) ** sum(corner))
    return _first_left_over(shape, np.concatenate(points), np.concatenate(signs))


def _first_left_over(shape: Sequence[int], points: Ints, signs: Ints) -> Fault | None:
    if len(points) == 0:
        return None
    order = np.lexsort(points.T[::-1])
    points, signs = points[order], signs[order]
    new = np.concatenate([[True], np.any(points[1:] != points[:-1], axis=1)])
    left_over = np.flatnonzero(np.add.reduceat(signs, np.flatnonzero(new)))
    if len(left_over) == 0:
        return None
    first = np.flatnonzero(new)[left_over[0]]
    point = tuple(int(x) for x in points[first, 1:])
    inside = all(0 <= x < n for x, n in zip(point, shape, strict=True))
    excess = int(np.add.reduceat(signs, np.flatnonzero(new))[left_over[0]])
    return Fault(int(points[first, 0]), point, excess + inside)


def merge(key: Ints, low: Ints, high: Ints) -> tuple[Ints, Ints, Ints]:
    """The union of half-open intervals per key: (key, low, high), sorted; touching ones are joined."""
    kept = low < high
    key, low, high = key[kept], low[kept], high[kept]
    if len(key) == 0:
        return key, low, high
    order = np.lexsort((low, key))
    key, low, high = key[order], low[order], high[order]
    _, _, rank = numbered(key)
    base = int(low.min())
    span = int(high.max()) - base + 2
    assert (int(rank[-1]) + 1) * span < 2**62, "intervals too large to merge at once"
    reach = np.maximum.accumulate(rank * span + (high - base))
    new = np.concatenate([[True], rank[1:] * span + (low[1:] - base) > reach[:-1]])
    first = np.flatnonzero(new)
    last = np.concatenate([first[1:], [len(key)]]) - 1
    return key[first], low[first], reach[last] - rank[last] * span + base
