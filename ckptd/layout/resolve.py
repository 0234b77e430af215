"""A layout at one mesh and one model: every place's arrays, and the tiles of every logical tensor.

Costs follow *forms*, not tensors: tensors of one rule and one shape that the same ranks hold have the same
boxes, and these are computed once.  Asking for one place computes that place only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ckptd.errors import LayoutRefused
from ckptd.layout import geometry, naming
from ckptd.layout.arithmetic import environment
from ckptd.layout.arithmetic import evaluate as number
from ckptd.layout.buffers import Buffers, choose
from ckptd.layout.claims import Claims, Part, Stored, claim
from ckptd.layout.distinct import distinct
from ckptd.layout.expressions import (
    As,
    Average,
    Axis,
    Extent,
    Layout,
    Number,
    Rep,
    Rest,
    Rule,
    Store,
    When,
)
from ckptd.layout.mesh import Mesh, build
from ckptd.layout.runs import Table, grid_axes, table
from ckptd.layout.tiles import Ints, Tiles


@dataclass(frozen=True)
class Form:
    """How the arrays of one rule and shape look: for each dimension an expression and its names' values."""

    axes: tuple[Axis, ...]
    values: tuple[Mapping[str, int], ...]
    grids: tuple[str, ...]  # the mesh axes that split a dimension

    def tables(self, mesh: Mesh, ranks: Ints) -> tuple[Table, ...]:
        columns = {name: mesh.column(name)[ranks] for name in self.grids}
        return tuple(
            table(axis, values, columns, len(ranks))
            for axis, values in zip(self.axes, self.values, strict=True)
        )


# Answers about single places that are kept: the forms of a model are a few dozen.
REMEMBERED = 256


class Placement:
    """Where every logical tensor lies.  Made by `resolve`; a value, but for remembered answers."""

    def __init__(
        self,
        layout: Layout,
        mesh: Mesh,
        values: Mapping[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        claims: Claims,
    ) -> None:
        self.layout, self.mesh, self.values, self.claims = layout, mesh, values, claims
        self.names = tuple(shapes)
        self.buffers: Buffers | None = None
        self._shapes = dict(shapes)
        self._forms: dict[tuple[object, ...], Form] = {}
        self._whole: dict[tuple[object, ...], Tiles] = {}  # forms at all their holders
        self._some: dict[tuple[object, ...], Tiles] = {}  # forms at the places last asked for
        self._parts = {part.tensor: (array, part) for array in claims.stored for part in array.parts}

    # --- what callers ask ------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape. Raises: ValueError: no such tensor."""
        if name not in self._shapes:
            raise ValueError(f"{name} is not among the {len(self._shapes)} logical tensors")
        return self._shapes[name]

    def tiles(self, name: str, places: Iterable[int] | None = None) -> Tiles:
        """The tensor's boxes at all places, or only at these; an alias or a dropped tensor has none.

        Raises:
            ValueError: no such tensor or place.
            LayoutRefused: no rule claims it.
        """
        shape = self.shape(name)
        if name not in self._parts:
            if name in self.claims.owner:
                return _empty(shape)
            raise unclaimed(name)
        array, part = self._parts[name]
        ranks = self.holders(array, places)
        if len(ranks) == 0:
            return _empty(shape)
        if self.buffers is not None:
            return self.buffers.tiles(array, part, ranks)
        form, memory = self.form(array), self._whole
        key: tuple[object, ...] = (id(form), part.label, part.picks, array.rule)
        if places is None:
            assert array.fixed is not None
            key = (*key, tuple(sorted(array.fixed.items())))
        else:
            key, memory = (*key, ranks.tobytes()), self._some
        if key not in memory:
            if memory is self._some and len(memory) >= REMEMBERED:
                memory.clear()
            memory[key] = self.plain(form, array, part, ranks)
        return replace(memory[key], arrays=(array.name,))

    def arrays(self, place: int) -> dict[str, tuple[int, ...]]:
        """The arrays that this place stores, by name; in the module's order."""
        if self.buffers is not None:
            return self.buffers.arrays(place)
        return self.local(place)

    def fillers(self, place: int) -> list[geometry.Filler]:
        """The padding in this place's arrays."""
        if self.buffers is not None:
            return self.buffers.fillers(place)
        found = []
        for array in self.claims.stored:
            ranks = self.holders(array, [place])
            if len(ranks):
                tables = self.form(array).tables(self.mesh, ranks)
                shapes = geometry.local_shapes(tables, 1)
                found.extend(geometry.fillers_of(array.name, tables, geometry.whole(shapes), shapes))
        return found

    @cached_property
    def lossy(self) -> dict[str, str]:
        """Tensors whose rule loses information, and the verb that does (avg, drop)."""
        found = dict.fromkeys(self.claims.dropped, "drop")
        for array in self.claims.stored:
            if any(isinstance(verb, Average) for verb in self.rule(array).verbs):
                found.update((part.tensor, "avg") for part in array.parts)
        return found

    def dtype(self, name: str) -> str | None:
        """The dtype that the layout stores this tensor in, if its rule says one (`as`)."""
        if name not in self.claims.owner:
            return None
        verbs = self.layout.rules[self.claims.owner[name]].verbs
        return next((verb.dtype for verb in verbs if isinstance(verb, As)), None)

    # --- what the buffers and the proof ask as well ----------------------------------------

    def rule(self, array: Stored) -> Rule:
        return self.layout.rules[array.rule]

    def part(self, name: str) -> tuple[Stored, Part]:
        """The stored array and the part of it that is this tensor; KeyError for an alias."""
        return self._parts[name]

    def holders(self, array: Stored, places: Iterable[int] | None = None) -> Ints:
        """The ranks (of all, or of these) that hold the array, ascending."""
        if places is None:
            return np.zeros(0, np.int64) if array.fixed is None else self.mesh.where(array.fixed)
        ranks = distinct(np.fromiter(places, np.int64))
        if len(ranks) and not 0 <= ranks[0] <= ranks[-1] < self.mesh.size:
            raise ValueError(
                f"places {ranks[0]} .. {ranks[-1]} are not all in a mesh of {self.mesh.size} ranks"
            )
        return ranks[:0] if array.fixed is None else self.mesh.where(array.fixed, ranks)

    def local(self, place: int) -> dict[str, tuple[int, ...]]:
        """The place's arrays before they go into buffers."""
        found = {}
        for array in self.claims.stored:
            ranks = self.holders(array, [place])
            if len(ranks):
                found[array.name] = tuple(
                    geometry.local_shapes(self.form(array).tables(self.mesh, ranks), 1)[0].tolist()
                )
        return found

    def form(self, array: Stored) -> Form:
        """How this array looks; checks that its parts have the shapes that the rule's axes say.

        Raises: LayoutRefused: they have not.
        """
        shapes = tuple(self._shapes[part.tensor] for part in array.parts)
        key = (array.rule, shapes, tuple((part.label, part.picks) for part in array.parts))
        if key not in self._forms:
            self._forms[key] = _form(self.rule(array), array, shapes, self.values, self.mesh)
        return self._forms[key]

    def split_axes(self, array: Stored) -> tuple[set[str], tuple[str, ...], set[str]]:
        """(axes used by splits and indices, axes of a basis of the mesh, axes declared `rep` or `avg`)."""
        declared = {
            axis for verb in self.rule(array).verbs if isinstance(verb, (Rep, Average)) for axis in verb.grid
        }
        line = self.rule(array).line
        unknown = declared - set(self.mesh.sizes)
        if unknown:
            raise LayoutRefused(
                f"line {line}: {array.name} is declared equal over {min(unknown)}, which is no mesh axis",
                rule=line,
            )
        used = {*self.form(array).grids, *(array.fixed or {})}
        both = declared & used
        if both:
            raise LayoutRefused(
                f"line {line}: {array.name} is declared equal over {min(both)}, and also split over it",
                rule=line,
                tensor=array.parts[0].tensor,
            )
        used.update(self.buffers.grids(array) if self.buffers is not None else ())
        return used, self.mesh.basis(used | declared), declared

    def covers(self, array: Stored, ranks: Ints) -> Ints:
        """[n]: the number of the replica that each of these ranks holds a part of."""
        used, basis, _ = self.split_axes(array)
        return self.mesh.indices([axis for axis in basis if axis not in used], ranks)

    def plain(self, form: Form, array: Stored, part: Part, ranks: Ints) -> Tiles:
        tables = form.tables(self.mesh, ranks)
        shapes = geometry.local_shapes(tables, len(ranks))
        boxes = geometry.cut(geometry.narrowed(tables, part), geometry.whole(shapes))
        at = boxes.view
        return geometry.made(
            self._shapes[part.tensor], part, boxes, np.zeros_like(at), at, ranks, shapes,
            self.covers(array, ranks), np.zeros(len(ranks), np.int64), (array.name,),
        )  # fmt: skip


def resolve(
    layout: Layout,
    *,
    parameters: Mapping[str, int],
    mesh: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    orders: Mapping[str, Sequence[str]] | None = None,
    state: str = "",
) -> Placement:
    """The layout's meaning for these sizes and tensors.

    Args:
        parameters: the layout's parameters; one that is also a mesh axis may be left out.
        mesh: the size of every mesh axis; of a fold's axes one may be left out.
        shapes: every logical tensor's shape, in the module's order.
        orders: lists of array (or logical) names for flat buffers `cat(name)`; `module` is known without.
            A list `name[0]`, `name[1]`, ... makes a buffer each, whose key has the number as `{name}`.
        state: which state of the parameters; the layout's first by default.  A store whose path or key has
            `{state}` holds all states that no other store holds.

    Raises: LayoutRefused: the layout does not fit the sizes or the tensors.
    """
    where = build(layout.mesh, layout.folds, mesh)
    values = environment(layout.parameters, layout.lets, parameters, where.sizes)
    layout = _holding(layout, values)
    checked = {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}
    placement = Placement(layout, where, values, checked, claim(layout, where, values, checked))
    for array in placement.claims.stored:
        placement.form(array)
    names = [name for name, _ in layout.states]
    chosen = state or (names[0] if names else "")
    if names and chosen not in names:
        raise LayoutRefused(f"the layout has no state {chosen}", next=f"it has: {', '.join(names)}")
    stores = _stores(layout, chosen, names)
    placement.buffers = choose(placement, stores, orders or {}, chosen)
    for array in placement.claims.stored:
        placement.split_axes(array)
    return placement


def unclaimed(name: str) -> LayoutRefused:
    return LayoutRefused(
        f"no rule claims {name}", tensor=name, next="write a rule for it, or drop it by name"
    )


def _form(
    rule: Rule, array: Stored, shapes: tuple[tuple[int, ...], ...], values: Mapping[str, int], mesh: Mesh
) -> Form:
    picked = [dim for dim, _ in array.parts[0].picks]
    given = rule.axes if rule.axes is not None else (Rest(),)
    is_transposed = array.parts[0].transposed
    axes, own = _own(given, shapes[0][::-1] if is_transposed else shapes[0], picked)
    envs = tuple({**values, "_": extent} for extent in own)
    grids = tuple(dict.fromkeys(name for axis in axes for name in grid_axes(axis) if name in mesh.sizes))
    form = Form(axes, envs, grids)
    try:
        tables = form.tables(mesh, np.zeros(1, np.int64))
    except LayoutRefused as error:
        raise LayoutRefused(
            f"line {rule.line}: {array.name}: {error}", rule=rule.line, tensor=array.parts[0].tensor
        ) from error
    for part, shape in zip(array.parts, shapes, strict=True):
        said, rest = [], part.label
        for dim in range(len(tables) - 1, -1, -1):
            rest, label = divmod(rest, len(tables[dim].labels))
            said.append(tables[dim].extents[label])
        expected = tuple(size for dim, size in enumerate(reversed(said)) if dim not in picked)
        expected = expected[::-1] if is_transposed else expected
        if expected != shape:
            raise LayoutRefused(
                f"line {rule.line}: {naming.show(rule.name)} says that {part.tensor} has shape "
                f"{list(expected)}, but its shape is {list(shape)}",
                rule=rule.line,
                tensor=part.tensor,
                next="check the rule's axes and the layout's parameters",
            )
    return form


def _own(
    given: Sequence[Axis | Rest], shape: tuple[int, ...], picked: Sequence[int]
) -> tuple[tuple[Axis, ...], tuple[int, ...]]:
    """The axes with `...` written out, and for each the logical tensor's own extent (0 where it has none)."""
    axes = [axis for axis in given if not isinstance(axis, Rest)]
    extents = list(shape)
    for dim in picked:
        extents.insert(dim, 0)
    if any(isinstance(axis, Rest) for axis in given):
        if not isinstance(given[-1], Rest) or len(axes) != len(given) - 1:
            raise LayoutRefused("... stands last in a rule's axes, and once")
        axes.extend(Extent(Number(size)) for size in extents[len(axes) :])
    extents.extend([0] * (len(axes) - len(extents)))
    return tuple(axes), tuple(extents[: len(axes)])


def _holding(layout: Layout, values: Mapping[str, int]) -> Layout:
    """The layout with those rules and stores only whose `when` holds."""
    rules = tuple(
        rule
        for rule in layout.rules
        if all(number(verb.condition, values) for verb in rule.verbs if isinstance(verb, When))
    )
    stores = tuple(store for store in layout.stores if store.when is None or number(store.when, values))
    return replace(layout, rules=rules, stores=stores)


def _stores(layout: Layout, state: str, states: Sequence[str]) -> list[Store]:
    """The stores that hold this state."""
    own = [store for store in layout.stores if not _has_state(store)]
    every = [store for store in layout.stores if _has_state(store)]
    if not own or not every:
        return own or every
    return own if not states or state == states[0] else every


def _has_state(store: Store) -> bool:
    return any(
        index.id == "state" for pattern in (store.path, store.key) for index in naming.indices(pattern)
    )


def _empty(shape: tuple[int, ...]) -> Tiles:
    none, flat = np.zeros((0, len(shape)), np.int64), np.zeros(0, np.int64)
    return Tiles(shape, none, none, flat, flat, flat, none, flat, ())
