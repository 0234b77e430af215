"""A placement's flat buffers: which arrays each store's buffer has, in what order, and where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ckptd.errors import LayoutRefused
from ckptd.layout import boxes, flat, geometry, naming
from ckptd.layout.claims import Part, Stored
from ckptd.layout.distinct import distinct, numbered
from ckptd.layout.expressions import Pattern, Store
from ckptd.layout.geometry import Filler, Views
from ckptd.layout.tiles import Ints, Tiles

if TYPE_CHECKING:
    from ckptd.layout.resolve import Placement


@dataclass(frozen=True)
class Group:
    """What ranks have that differ only in the shares of the buffer."""

    members: tuple[Stored, ...]  # in the buffer's order
    item: Mapping[str, int]  # the first tensor of a member -> its place in the order
    shapes: tuple[tuple[int, ...], ...]
    buffer: flat.Buffer


@dataclass(frozen=True)
class Line:
    """One kind of buffer: a store, and the arrays that go into it wherever they are held."""

    store: Store
    steps: flat.Steps
    name: Pattern
    numbers: Mapping[str, int | str]  # of the name's indices that are no coordinates
    members: tuple[Stored, ...]
    axes: tuple[str, ...]  # of the mesh, but those that the buffer is split over: they tell groups apart
    groups: dict[int, Group] = field(default_factory=dict, compare=False, repr=False)


class Buffers:
    """The flat buffers of a placement."""

    def __init__(self, placement: Placement, lines: Sequence[Line]) -> None:
        self.lines = tuple(lines)
        self._placement, self._mesh = placement, placement.mesh
        self._line = {array.parts[0].tensor: line for line in lines for array in line.members}

    def line(self, array: Stored) -> Line:
        return self._line[array.parts[0].tensor]

    def grids(self, array: Stored) -> tuple[str, ...]:
        """The mesh axes that split the array's buffer."""
        return self.line(array).steps.grids

    def tiles(self, array: Stored, part: Part, ranks: Ints) -> Tiles:
        """The part's boxes at these ranks, all of which hold the array."""
        line = self.line(array)
        form = self._placement.form(array)
        tables = form.tables(self._mesh, ranks)
        views = self.views(line, array, ranks)
        cut = geometry.cut(geometry.narrowed(tables, part), views)
        array_index, names = self.names(line, ranks)
        shape, covers = self._placement.shape(part.tensor), self._placement.covers(array, ranks)
        shapes, base, place = (
            geometry.local_shapes(tables, len(ranks)),
            views.base[cut.view],
            views.place[cut.view],
        )
        return geometry.made(shape, part, cut, base, place, ranks, shapes, covers, array_index, names)

    def arrays(self, place: int) -> dict[str, tuple[int, ...]]:
        """The place's buffers and their lengths."""
        found: dict[str, tuple[int, ...]] = {}
        for line, group, ranks in self._at(place):
            _, names = self.names(line, ranks)
            if names[0] in found:
                raise LayoutRefused(
                    f"line {line.store.line}: place {place} has two buffers called {names[0]}",
                    rule=line.store.line,
                )
            found[names[0]] = (int(group.buffer.stored(self._mesh.indices(line.steps.grid, ranks))[0]),)
        return found

    def fillers(self, place: int) -> list[Filler]:
        """Gaps between the items and at the end, and the padding of the arrays themselves."""
        found: list[Filler] = []
        for line, group, ranks in self._at(place):
            name = self.names(line, ranks)[1][0]
            shares = (self._mesh.indices(grid, ranks) for grid in (line.steps.item_grid, line.steps.grid))
            low, high, base = group.buffer.all_ranges(*(int(share[0]) for share in shares))
            stored = self.arrays(place)[name][0]
            ends = np.concatenate(([0], (base + high)[low < high]))
            begins = np.concatenate(((base + low)[low < high], [stored]))
            for end, begin in zip(ends.tolist(), begins.tolist(), strict=True):
                if begin > end:
                    found.append(Filler(name, end, (begin - end,), (1,), "zero"))
            for array in group.members:
                tables = self._placement.form(array).tables(self._mesh, ranks)
                shapes = geometry.local_shapes(tables, 1)
                found.extend(geometry.fillers_of(name, tables, self.views(line, array, ranks), shapes))
        return found

    def views(self, line: Line, array: Stored, ranks: Ints) -> Views:
        """The boxes of the array that these ranks' shares of the buffer hold."""
        key = self._mesh.indices(line.axes, ranks)
        item_share = self._mesh.indices(line.steps.item_grid, ranks)
        share = self._mesh.indices(line.steps.grid, ranks)
        found: list[tuple[Ints, Ints, Ints, Ints]] = []
        for number in distinct(key).tolist():
            mine = np.flatnonzero(key == number)
            group = self.group(line, int(ranks[mine[0]]))
            item = group.item[array.parts[0].tensor]
            low, high, base = group.buffer.ranges(item, item_share[mine], share[mine])
            here = np.flatnonzero(low < high)
            which, offsets, sizes = boxes.of_ranges(group.shapes[item], low[here], high[here])
            which = here[which]
            found.append((mine[which], base[which], offsets, offsets + sizes))
        return Views(*(np.concatenate(columns) for columns in zip(*found, strict=True)))

    def names(self, line: Line, ranks: Ints) -> tuple[Ints, tuple[str, ...]]:
        """([n] index into the names, the buffers' names at these ranks)."""
        axes = [index.id for index in naming.indices(line.name) if index.id not in line.numbers]
        _, first, inverse = numbered(self._mesh.indices(axes, ranks))
        names = []
        for rank in ranks[first].tolist():
            names.append(naming.fill(line.name, {**line.numbers, **self._mesh.coordinates(rank)}))
        return inverse.reshape(-1), tuple(names)

    def group(self, line: Line, rank: int) -> Group:
        """The group of this rank."""
        key = int(self._mesh.indices(line.axes, np.array([rank]))[0])
        if key not in line.groups:
            line.groups[key] = self._made(line, rank)
        return line.groups[key]

    def _made(self, line: Line, rank: int) -> Group:
        ranks = np.array([rank])
        coordinates = self._mesh.coordinates(rank)
        held = [
            array
            for array in line.members
            if array.fixed is not None and all(coordinates[axis] == at for axis, at in array.fixed.items())
        ]
        if line.store.flat is not None and line.store.flat.is_reversed:
            held.reverse()
        seen: dict[int, tuple[int, ...]] = {}
        shapes = []
        for array in held:
            form = self._placement.form(array)
            if id(form) not in seen:
                seen[id(form)] = tuple(geometry.local_shapes(form.tables(self._mesh, ranks), 1)[0].tolist())
            shapes.append(seen[id(form)])
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
        item = {array.parts[0].tensor: position for position, array in enumerate(held)}
        return Group(tuple(held), item, tuple(shapes), flat.lay(line.steps, sizes, line.store.line))

    def _at(self, place: int) -> Iterator[tuple[Line, Group, Ints]]:
        for line in self.lines:
            group = self.group(line, place)
            if group.members:
                yield line, group, np.array([place])


def choose(
    placement: Placement, stores: Sequence[Store], orders: Mapping[str, Sequence[str]], state: str
) -> Buffers | None:
    """The buffers of these stores; None if none of them is flat.

    Raises: LayoutRefused: an order was not given, or an array is in no buffer, or in two.
    """
    given = [store for store in stores if store.flat is not None]
    if not given:
        return None
    listed: list[tuple[Store, dict[str, int | str], list[Stored] | None]] = []
    by_name = _by_name(placement.claims.stored)
    taken: dict[str, Store] = {}
    for store, numbers, names in _orders(given, orders):
        members = None if names is None else _members(store, names, by_name)
        for array in members or ():
            other = taken.setdefault(array.parts[0].tensor, store)
            if other is not store or sum(array is one for one in members or ()) > 1:
                raise LayoutRefused(
                    f"line {store.line}: {array.name} goes into two buffers, or into one twice",
                    rule=store.line,
                    tensor=array.parts[0].tensor,
                )
        listed.append((store, numbers, members))
    rest = [array for array in placement.claims.stored if array.parts[0].tensor not in taken]
    open_ended = [store for store, _, members in listed if members is None]
    if len(open_ended) > 1 or (rest and not open_ended):
        culprit = open_ended[1] if open_ended else given[0]
        raise LayoutRefused(
            f"line {culprit.line}: two buffers are of the whole module"
            if open_ended
            else f"{rest[0].name} is in no flat buffer",
            rule=culprit.line,
            tensor="" if open_ended else rest[0].parts[0].tensor,
            next="list the arrays of each buffer, every one once",
        )
    return Buffers(
        placement,
        [_line(placement, store, numbers, rest if m is None else m, state) for store, numbers, m in listed],
    )


def _orders(
    stores: Sequence[Store], orders: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Store, dict[str, int | str], Sequence[str] | None]]:
    """Each buffer's list of names; None is the whole module in its order."""
    for store in stores:
        assert store.flat is not None
        order = store.flat.order
        if order in orders:
            yield store, {}, orders[order]
        elif f"{order}[0]" in orders:
            count = sum(name.startswith(f"{order}[") for name in orders)
            for number in range(count):
                yield store, {order: number}, orders[f"{order}[{number}]"]
        elif order == "module":
            yield store, {}, None
        else:
            raise LayoutRefused(
                f"line {store.line}: the buffer is cat({order}), and no order {order} was given",
                rule=store.line,
                next=f"give orders={{{order!r}: [names]}}; known without: module",
            )


def _by_name(stored: Sequence[Stored]) -> dict[str, list[Stored]]:
    found: dict[str, list[Stored]] = {}
    for array in stored:
        for name in {array.name, *(part.tensor for part in array.parts)}:
            found.setdefault(name, []).append(array)
    return found


def _members(store: Store, names: Sequence[str], by_name: Mapping[str, list[Stored]]) -> list[Stored]:
    """The arrays listed; an array's own name goes before a logical tensor's."""
    found: list[Stored] = []
    for name in names:
        arrays = by_name.get(name, [])
        own = [array for array in arrays if array.name == name]
        if not arrays:
            raise LayoutRefused(
                f"line {store.line}: the buffer's list names {name}, which no rule stores",
                rule=store.line,
                tensor=name,
            )
        found.extend(own or arrays)
    return found


def _line(
    placement: Placement, store: Store, numbers: dict[str, int | str], members: Sequence[Stored], state: str
) -> Line:
    assert store.flat is not None
    mesh = placement.mesh
    steps = flat.steps(store.flat, mesh.sizes, placement.values, store.line)
    for array in members:
        both = set(steps.grids) & {*placement.form(array).grids, *(array.fixed or {})}
        if both:
            raise LayoutRefused(
                f"line {store.line}: {min(both)} splits the buffer, and also {array.name} that goes into it",
                rule=store.line,
                tensor=array.parts[0].tensor,
            )
    known: dict[str, int | str] = {**numbers, "state": state}
    for index in naming.indices(store.key):
        if index.id not in known and index.id not in mesh.sizes:
            raise LayoutRefused(
                f"line {store.line}: the key has {{{index.id}}}, which is no mesh axis", rule=store.line
            )
    axes = tuple(axis for axis in mesh.basis(steps.grids) if axis not in steps.grids)
    return Line(store, steps, store.key, known, tuple(members), axes)
