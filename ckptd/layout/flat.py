"""Flat buffers: the arrays of a place ravelled one after another, aligned, padded and split.

Ranks that differ only in the coordinates of the flat's grids are one *group*: before the splits all of them
have the same arrays, and after them each has its share.  The whole difference between ZeRO-3 and ZeRO-2 is
whether the split stands among the steps of the items or of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm, prod

import numpy as np

from ckptd.errors import LayoutRefused
from ckptd.layout.arithmetic import evaluate as number
from ckptd.layout.expressions import Align, Flat, Grid, SplitOver, Step, Strip
from ckptd.layout.tiles import Ints


@dataclass(frozen=True)
class Steps:
    """A flat's steps with their numbers."""

    align: int  # every item starts at a multiple
    item_pad: int  # an item's length before its split
    item_grid: Grid
    item_ranks: int
    slot_pad: int  # an item's share after the split
    pad: int  # the whole before its split
    grid: Grid
    ranks: int
    strip: bool  # padding at the whole's end is not stored

    @property
    def grids(self) -> Grid:
        return (*self.item_grid, *self.grid)


@dataclass(frozen=True)
class Buffer:
    """The buffer of one group: where each item lies in what a rank has before the split of the whole."""

    steps: Steps
    size: Ints  # [items] elements of the item's ravel
    width: Ints  # [items] of which a rank has so many; its padding included
    start: Ints  # [items]
    end: int  # of the last item, its padding included
    share: int  # elements of the whole that a rank has, padding included

    def stored(self, whole_share: Ints) -> Ints:
        """The lengths of the buffers that ranks with these shares of the whole store."""
        if not self.steps.strip:
            return np.full_like(whole_share, self.share)
        return np.clip(self.end - whole_share * self.share, 0, self.share)

    def ranges(self, item: int, item_share: Ints, whole_share: Ints) -> tuple[Ints, Ints, Ints]:
        """For ranks with these shares: (low, high) of the item's ravel, and where its element 0 would be.

        An item that is not there has low >= high.
        """
        width = int(self.width[item])
        begin = item_share * width
        base = int(self.start[item]) - begin - whole_share * self.share
        low = np.maximum(begin, -base)
        high = np.minimum(np.minimum(begin + width, int(self.size[item])), self.stored(whole_share) - base)
        return low, np.maximum(high, low), base

    def all_ranges(self, item_share: int, whole_share: int) -> tuple[Ints, Ints, Ints]:
        """`ranges` of every item [items], for one rank."""
        begin = item_share * self.width
        base = self.start - begin - whole_share * self.share
        stored = int(self.stored(np.array([whole_share]))[0])
        low = np.maximum(begin, -base)
        high = np.minimum(np.minimum(begin + self.width, self.size), stored - base)
        return low, np.maximum(high, low), base


def steps(flat: Flat, mesh_sizes: Mapping[str, int], values: Mapping[str, int], line: int) -> Steps:
    """The flat's numbers, for these sizes of mesh axes and values of all names.

    Raises: LayoutRefused: a step that has no meaning where it stands, two splits, or a grid without sizes.
    """
    align, item_pad, item_grid, slot_pad, stripped = _read(flat.per_item, values, line)
    if stripped:
        raise LayoutRefused(
            f"line {line}: strip is a step of the whole buffer", rule=line, next="write it after then"
        )
    none, pad, grid, after, strip = _read(flat.whole, values, line)
    if none != 1:
        raise LayoutRefused(f"line {line}: align is a step of items", rule=line, next="write it before then")
    if after != 1:
        raise LayoutRefused(
            f"line {line}: the whole is padded after its split", rule=line, next="pad it before"
        )
    shared = set(item_grid) & set(grid)
    if shared:
        raise LayoutRefused(
            f"line {line}: the items and the whole are both split over {min(shared)}", rule=line
        )
    ranks = [prod(_size(name, mesh_sizes, line) for name in names) for names in (item_grid, grid)]
    return Steps(align, item_pad, item_grid, ranks[0], slot_pad, pad, grid, ranks[1], strip)


def lay(numbers: Steps, sizes: Sequence[int], line: int) -> Buffer:
    """The buffer of a group whose items have these sizes, in order.

    Raises: LayoutRefused: a split that leaves a rest.
    """
    size = np.asarray(sizes, np.int64)
    padded = _up(size, numbers.item_pad)
    uneven = np.flatnonzero(padded % numbers.item_ranks)
    if len(uneven):
        raise _rest("an item", int(padded[uneven[0]]), numbers.item_grid, numbers.item_ranks, line)
    width = padded // numbers.item_ranks
    slot = _up(width, numbers.slot_pad)
    room = _up(slot, numbers.align)
    start = np.cumsum(room) - room
    end = int(start[-1] + slot[-1]) if len(size) else 0
    whole = int(_up(np.array([end]), numbers.pad)[0])
    if whole % numbers.ranks:
        raise _rest("the buffer", whole, numbers.grid, numbers.ranks, line)
    return Buffer(numbers, size, width, start, end, whole // numbers.ranks)


def _read(given: Sequence[Step], values: Mapping[str, int], line: int) -> tuple[int, int, Grid, int, bool]:
    """(align, multiple before the split, grid, multiple after it, strip) of a list of steps."""
    align, before, after, strip = 1, 1, 1, False
    grid: Grid = ()
    for step in given:
        if isinstance(step, Strip):
            strip = True
        elif isinstance(step, SplitOver):
            if grid:
                raise LayoutRefused(
                    f"line {line}: two splits in one list of steps", rule=line, next="write @(a*b)"
                )
            grid = step.grid
        else:
            multiple = number(step.multiple, values)
            if multiple < 1:
                raise LayoutRefused(f"line {line}: a multiple of {multiple}", rule=line)
            if isinstance(step, Align):
                align = lcm(align, multiple)
            elif grid:
                after = lcm(after, multiple)
            else:
                before = lcm(before, multiple)
    return align, before, grid, after, strip


def _up(size: Ints, multiple: int) -> Ints:
    return -(-size // multiple) * multiple


def _size(name: str, values: Mapping[str, int], line: int) -> int:
    if name not in values:
        raise LayoutRefused(f"line {line}: the buffer is split over {name}, which is no mesh axis", rule=line)
    return values[name]


def _rest(what: str, size: int, grid: Grid, ranks: int, line: int) -> LayoutRefused:
    axes = " * ".join(grid)
    return LayoutRefused(
        f"line {line}: {what} of {size} elements does not split evenly over {axes} = {ranks} ranks",
        rule=line,
        next=f"pad it first: ^{ranks} @{axes}",
    )
