"""The proof that a placement is a bijection, from metadata alone, before a byte is read.

What is proved: every logical tensor is claimed once, or tied or dropped by name; the boxes of each replica
tile the tensor exactly; replicas are declared; the arrays of every place are filled exactly by tiles and
padding; and padding says what is written there.  What no proof can know is meaning: a layout with k and v
exchanged is a perfect bijection.  A tensor's meaning is confirmed by something else (`references`), or
reported as unconfirmed.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from ckptd.errors import LayoutRefused
from ckptd.layout import boxes, geometry, naming
from ckptd.layout.claims import Stored
from ckptd.layout.distinct import distinct
from ckptd.layout.expressions import Drop, Tied
from ckptd.layout.resolve import Placement, unclaimed
from ckptd.layout.runs import FILLS, Table
from ckptd.layout.tiles import Ints, Tiles

# A message about many ranks names so many of them.
SHOWN_RANKS = 8


@dataclass(frozen=True)
class Report:
    """What was proved of a layout.  `str(report)` is a few lines for the user."""

    layout: str
    places: int
    tensors: int  # with tiles
    elements: int  # of these, each counted once
    tiles: int
    padding: int  # elements of padding over all places
    tied: Mapping[str, str]
    lossy: Mapping[str, str]  # tensor -> the verb that loses information
    idle_rules: tuple[int, ...]  # lines of rules that claim no tensor
    confirmed: frozenset[str]
    unconfirmed: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.layout}: {self.tensors} tensors, {self.elements} elements, {self.tiles} tiles "
            f"on {self.places} places; every element is covered exactly once per replica"
        ]
        if self.padding:
            lines.append(f"{self.padding} elements of padding")
        if self.tied:
            lines.append(
                f"tied: {', '.join(f'{alias} = {name}' for alias, name in sorted(self.tied.items()))}"
            )
        for verb in sorted(set(self.lossy.values())):
            lines.append(
                f"{verb}: {', '.join(sorted(name for name, by in self.lossy.items() if by == verb))}"
            )
        if self.unconfirmed:
            lines.append(f"layout unconfirmed: {len(self.unconfirmed)} tensors")
        else:
            lines.append("layout confirmed by references")
        return "\n".join(lines)


def prove(
    placement: Placement,
    *,
    references: Collection[str] = (),
    stored: Mapping[int, Mapping[str, Sequence[int]]] | None = None,
    written: bool = True,
) -> Report:
    """Proves the placement, or says where it is wrong.

    Args:
        references: logical tensors whose meaning something else confirmed.
        stored: place -> the arrays that it really has, where known; they must be all the layout's.
        written: whether the layout is to be written; if only read, padding may be of any content.

    Raises: LayoutRefused: with the rule's line, the tensor, the elements and the ranks.
    """
    for name in placement.names:
        if name not in placement.claims.owner:
            raise unclaimed(name)
    _check_names(placement)
    filled = np.zeros(placement.mesh.size, np.int64)
    count = elements = 0
    proved: set[tuple[object, ...]] = set()
    for array in placement.claims.stored:
        _check_replicas(placement, array)
        for part in array.parts:
            tiles = placement.tiles(part.tensor)
            _check_cover(placement, array, part.tensor, tiles, proved)
            filled += np.bincount(tiles.place, boxes.volume(tiles.sizes), placement.mesh.size).astype(
                np.int64
            )
            count += len(tiles)
            elements += prod(tiles.shape)
    padding = _check_places(placement, filled, written)
    for place, arrays in (stored or {}).items():
        _check_stored(placement, place, arrays)
    confirmed = frozenset(references).intersection(placement.names)
    return Report(
        placement.layout.name,
        placement.mesh.size,
        sum(len(array.parts) for array in placement.claims.stored),
        elements,
        count,
        padding,
        placement.claims.tied,
        placement.lossy,
        tuple(placement.layout.rules[index].line for index in placement.claims.idle),
        confirmed,
        tuple(name for name in placement.names if name not in confirmed),
    )


# --- obligations --------------------------------------------------------------------------------


def _check_names(placement: Placement) -> None:
    """No place holds two arrays of one name."""
    by_name: dict[str, list[Stored]] = defaultdict(list)
    for array in placement.claims.stored:
        if array.fixed is not None:
            by_name[array.name].append(array)
    for name, arrays in by_name.items():
        axes = {tuple(sorted(array.fixed or {})) for array in arrays}
        points = {tuple(sorted((array.fixed or {}).items())) for array in arrays}
        if len(axes) == 1 and len(points) == len(arrays):
            continue
        for at, first in enumerate(arrays):
            for second in arrays[at + 1 :]:
                common = np.intersect1d(placement.holders(first), placement.holders(second))
                if len(common):
                    raise LayoutRefused(
                        f"line {placement.rule(second).line}: {_ranks(common)} would hold two arrays "
                        f"called {name}: for {first.parts[0].tensor} (line {placement.rule(first).line}) "
                        f"and for {second.parts[0].tensor}",
                        rule=placement.rule(second).line,
                        tensor=second.parts[0].tensor,
                        next="give the name an index that tells them apart",
                    )


def _check_replicas(placement: Placement, array: Stored) -> None:
    used, basis, declared = placement.split_axes(array)
    sizes = placement.mesh.sizes
    if array.fixed is None:  # held nowhere, which the cover's check says better
        return
    for axis in basis:
        if axis not in used and axis not in declared and sizes[axis] > 1:
            line, tensor = placement.rule(array).line, array.parts[0].tensor
            raise LayoutRefused(
                f"line {line}: {tensor} is held {sizes[axis]} times over axis {axis}, but the "
                f"layout does not say `rep {axis}`",
                rule=line,
                tensor=tensor,
                next=f"write rep {axis}, or split something over {axis}",
            )


def _check_cover(
    placement: Placement, array: Stored, name: str, tiles: Tiles, proved: set[tuple[object, ...]]
) -> None:
    """The boxes of every cover tile the tensor; equal sets of boxes are proved once."""
    line = placement.rule(array).line
    used, basis, _ = placement.split_axes(array)
    covers = prod(placement.mesh.sizes[axis] for axis in basis if axis not in used)
    volume = prod(tiles.shape)
    if len(tiles) == 0 and volume:
        why = "" if array.fixed is not None else "its indices and `on` ask for two coordinates of one axis"
        raise LayoutRefused(
            f"line {line}: no rank holds {name} (all {volume} elements are missing)",
            rule=line,
            tensor=name,
            why=why,
        )
    digest = hashlib.blake2b(digest_size=16)
    for column in (tiles.offsets, tiles.sizes, tiles.cover):
        digest.update(column.tobytes())
    key = (tiles.shape, covers, digest.digest())
    if key in proved:
        return
    _check_inside(placement, line, name, tiles)
    fault = boxes.fault(tiles.shape, tiles.offsets, tiles.sizes, tiles.cover)
    if fault is not None:
        raise _wrong_cover(line, name, tiles, fault)
    present = distinct(tiles.cover)
    if volume and len(present) != covers:
        missing = min(set(range(covers)) - set(present.tolist()))
        raise LayoutRefused(
            f"line {line}: replica {missing} of {name} is held by no rank", rule=line, tensor=name
        )
    proved.add(key)


def _check_inside(placement: Placement, line: int, name: str, tiles: Tiles) -> None:
    shape = np.asarray(tiles.shape, np.int64)
    outside = np.flatnonzero(((tiles.offsets < 0) | (tiles.offsets + tiles.sizes > shape)).any(axis=1))
    if len(outside):
        at = outside[0]
        raise LayoutRefused(
            f"line {line}: {name} has shape {list(tiles.shape)}, and rank {tiles.place[at]} holds "
            f"{_box(tiles.offsets[at], tiles.sizes[at])} of it",
            rule=line,
            tensor=name,
        )


def _wrong_cover(line: int, name: str, tiles: Tiles, fault: boxes.Fault) -> LayoutRefused:
    """Names the element, how often it is there, the boxes that hold it, and their ranks."""
    mine = tiles.at(tiles.cover == fault.group)
    point = np.asarray(fault.point, np.int64)
    holding = ((mine.offsets <= point) & (point < mine.offsets + mine.sizes)).all(axis=1)
    held = int(boxes.volume(mine.sizes).sum())
    found = f"{held} of {prod(tiles.shape)} elements are held"
    if not holding.any():
        ranks = _ranks(distinct(mine.place))
        return LayoutRefused(
            f"line {line}: {name}: element {list(fault.point)} of shape {list(tiles.shape)} "
            "is held by no rank",
            rule=line,
            tensor=name,
            why=f"{found} by {ranks}",
            next="check which axes split this tensor",
        )
    which = np.flatnonzero(holding)
    shown = ", ".join(
        f"{_box(mine.offsets[i], mine.sizes[i])} by rank {mine.place[i]}" for i in which[:SHOWN_RANKS]
    )
    return LayoutRefused(
        f"line {line}: {name}: element {list(fault.point)} of shape {list(tiles.shape)} is held "
        f"{len(which)} times in one replica",
        rule=line,
        tensor=name,
        why=f"{shown}; {found}",
        next="split it, or declare the replicas with rep",
    )


def _check_places(placement: Placement, filled: Ints, written: bool) -> int:
    """Every place's arrays are filled by tiles and padding, no more and no less; the sum of the padding."""
    if placement.buffers is not None:
        total, padding = _buffer_volumes(placement, written)
    else:
        total, padding = _array_volumes(placement, written)
    wrong = np.flatnonzero(total != filled + padding)
    if len(wrong):
        place = wrong[0]
        raise LayoutRefused(
            f"the volumes of rank {place} do not close: its arrays have {total[place]} elements, its tiles "
            f"{filled[place]}, and its padding {padding[place]}"
        )
    return int(padding.sum())


def _array_volumes(placement: Placement, written: bool) -> tuple[Ints, Ints]:
    """([places] elements of all arrays, [places] of them padding)."""
    total, padding = np.zeros((2, placement.mesh.size), np.int64)
    known: dict[tuple[object, ...], tuple[Ints, Ints, Ints]] = {}
    for array in placement.claims.stored:
        if array.fixed is None:
            continue
        form = placement.form(array)
        key = (id(form), tuple(sorted(array.fixed.items())))
        if key not in known:
            ranks = placement.holders(array)
            tables = form.tables(placement.mesh, ranks)
            for table in tables:
                _check_fill(placement, array, table, written)
            shapes = geometry.local_shapes(tables, len(ranks))
            numel = np.prod(shapes, axis=1, dtype=np.int64)
            known[key] = (ranks, numel, numel - _unpadded(tables, len(ranks)))
        ranks, numel, filler = known[key]
        total[ranks] += numel
        padding[ranks] += filler
    return total, padding


def _buffer_volumes(placement: Placement, written: bool) -> tuple[Ints, Ints]:
    """The same for flat buffers: gaps between items, and the padding that the items themselves have."""
    total, padding = np.zeros((2, placement.mesh.size), np.int64)
    mesh, buffers = placement.mesh, placement.buffers
    assert buffers is not None
    ranks = np.arange(mesh.size, dtype=np.int64)
    for line in buffers.lines:
        key = mesh.indices(line.axes, ranks)
        share, item_share = (mesh.indices(grid, ranks) for grid in (line.steps.grid, line.steps.item_grid))
        for number in distinct(key).tolist():
            mine = np.flatnonzero(key == number)
            group = buffers.group(line, int(mine[0]))
            if not group.members:
                continue
            stored = group.buffer.stored(share[mine])
            gaps = stored.copy()
            _check_order(line.store.line, group.buffer.start, group.buffer.width)
            for item in range(len(group.members)):
                low, high, _ = group.buffer.ranges(item, item_share[mine], share[mine])
                gaps -= high - low
            total[mine] += stored
            padding[mine] += gaps
        for array in line.members:
            holders = placement.holders(array)
            if len(holders) == 0:
                continue
            tables = placement.form(array).tables(mesh, holders)
            for table in tables:
                _check_fill(placement, array, table, written)
            if any((table.summand < 0).any() for table in tables):
                cut = geometry.cut(tables, views := buffers.views(line, array, holders))
                filler = (cut.summand < 0).any(axis=1)
                where = holders[views.place[cut.view[filler]]]
                np.add.at(padding, where, boxes.volume(cut.sizes[filler]))
    return total, padding


def _check_order(line: int, start: Ints, width: Ints) -> None:
    """Items of a buffer do not overlap."""
    overlap = np.flatnonzero(start[1:] < start[:-1] + width[:-1])
    if len(overlap):
        raise LayoutRefused(
            f"line {line}: items {overlap[0]} and {overlap[0] + 1} of the buffer overlap", rule=line
        )


def _check_fill(placement: Placement, array: Stored, table: Table, written: bool) -> None:
    """Within every sequence the runs are consecutive, and padding has a policy."""
    owner = np.repeat(np.arange(len(table.sizes)), np.diff(table.ptr))
    ends = table.local + table.length
    first = np.concatenate(([True], owner[1:] != owner[:-1]))[: len(owner)]
    before = np.where(first, 0, np.concatenate(([0], ends[:-1]))[: len(owner)])
    assert (table.local == before).all(), "runs of a sequence are consecutive"
    if written and (table.summand == FILLS["none"]).any():
        line, tensor = placement.rule(array).line, array.parts[0].tensor
        raise LayoutRefused(
            f"line {line}: the padding of {tensor} has no fill, so what would be written there is not said",
            rule=line,
            tensor=tensor,
            next="write ^n for zeros or ^n=last",
        )


def _unpadded(tables: Sequence[Table], count: int) -> Ints:
    """[count]: elements that no dimension pads."""
    volume = np.ones(count, np.int64)
    for table in tables:
        kept = np.concatenate(([0], np.cumsum(np.where(table.summand < 0, 0, table.length))))
        volume *= (kept[table.ptr[1:]] - kept[table.ptr[:-1]])[table.index]
    return volume


def _check_stored(placement: Placement, place: int, arrays: Mapping[str, Sequence[int]]) -> None:
    """The arrays that a place really has are the layout's."""
    said = placement.arrays(place)
    for name in said:
        if name not in arrays:
            raise LayoutRefused(
                f"rank {place} should hold {name} {list(said[name])}, and does not have it", tensor=name
            )
    for name, shape in arrays.items():
        if name not in said and _left_out(placement, name):
            continue
        if name not in said:
            raise LayoutRefused(
                f"rank {place} holds {name} {list(shape)}, which no rule claims",
                tensor=name,
                next="write a rule for it, or drop it by name",
            )
        if tuple(shape) != said[name]:
            raise LayoutRefused(
                f"rank {place} holds {name} with shape {list(shape)} = {prod(shape)} elements, and the "
                f"layout says {list(said[name])} = {prod(said[name])}",
                tensor=name,
                why="the volumes do not close",
                next="check padding, alignment and splits of its rule",
            )


def _left_out(placement: Placement, name: str) -> bool:
    """Whether a rule drops this array, or has it as another name of one."""
    return any(
        isinstance(verb, (Drop, Tied)) and any(naming.match(rule.name, [name], placement.values))
        for rule in placement.layout.rules
        for verb in rule.verbs
    )


def _box(offsets: Ints, sizes: Ints) -> str:
    return f"[{', '.join(f'{a}:{a + n}' for a, n in zip(offsets.tolist(), sizes.tolist(), strict=True))}]"


def _ranks(ranks: Ints) -> str:
    shown = ", ".join(map(str, ranks[:SHOWN_RANKS].tolist()))
    more = f" and {len(ranks) - SHOWN_RANKS} more" if len(ranks) > SHOWN_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
