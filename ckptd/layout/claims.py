"""Which rule claims which logical tensor, and as which part of which stored array.

A rule without `*` goes before one with; among those with, the one with more literal text.  One with `*`
claims only tensors that have as many dimensions as its axes.  Two rules of equal rank that claim one tensor
are refused, and so is a rule that finds some of its tensors and not the others.  A rule that finds none is
idle: presets name tensors that not every model of a family has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from ckptd.errors import LayoutRefused
from ckptd.layout import naming
from ckptd.layout.arithmetic import evaluate as number
from ckptd.layout.expressions import (
    Axis,
    Drop,
    Extent,
    Index,
    Layout,
    Name,
    On,
    Pad,
    Pattern,
    Rest,
    Rule,
    Split,
    Sum,
    Text,
    Tied,
    Transposed,
)
from ckptd.layout.expressions import Product as ProductOf
from ckptd.layout.mesh import Mesh


@dataclass(frozen=True)
class Part:
    """One logical tensor as a part of a stored array."""

    tensor: str
    label: int  # the summand (of all dimensions' sums, row-major)
    picks: tuple[
        tuple[int, int], ...
    ] = ()  # (stored dimension, index) where a dimension is an index of names
    transposed: bool = False  # the logical dimensions are the stored ones in reverse order


@dataclass(frozen=True)
class Stored:
    """One array of the layout, wherever it is held."""

    rule: int  # index into the layout's rules
    name: str  # what its holders call it
    fixed: Mapping[str, int] | None  # the coordinates of its holders; None where no place can have them
    parts: tuple[Part, ...]
    order: tuple[int, ...]  # sorts the arrays of a place as the module has them


@dataclass(frozen=True)
class Claims:
    stored: tuple[Stored, ...]
    tied: Mapping[str, str]  # alias -> the tensor that is stored
    dropped: tuple[str, ...]
    idle: tuple[int, ...]  # rules that claim nothing
    owner: Mapping[str, int]  # logical tensor -> rule


def claim(
    layout: Layout, mesh: Mesh, values: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> Claims:
    """All claims of a layout's rules on these tensors; tensors that no rule claims are simply not in them.

    Raises: LayoutRefused: as above, or a rule's pieces do not fit its name or its sums.
    """
    owner: dict[str, int] = {}
    stored: list[Stored] = []
    tied: dict[str, str] = {}
    dropped: list[str] = []
    idle: list[int] = []
    keys = _order_keys(layout.rules)
    ranges: dict[Index, naming.Range] = {}
    positions = {name: position for position, name in enumerate(shapes)}
    by_rank = sorted(range(len(layout.rules)), key=lambda index: _rank(layout.rules[index]), reverse=True)
    for index in by_rank:
        rule = layout.rules[index]
        found = list(_arrays(rule, index, layout, mesh, values, shapes, owner))
        if not found:
            idle.append(index)
        mine: set[str] = set()
        ties = [verb.name for verb in rule.verbs if isinstance(verb, Tied)]
        for chosen, texts, parts in found:
            for part in parts:
                if owner.setdefault(part.tensor, index) == index and part.tensor in mine:
                    raise _twice(part.tensor, rule, rule)
                mine.add(part.tensor)
            if ties:
                for part in parts:
                    tied[part.tensor] = naming.logical(ties[0], chosen, texts, values)
            elif any(isinstance(verb, Drop) for verb in rule.verbs):
                dropped.extend(part.tensor for part in parts)
            else:
                at = positions[parts[0].tensor]
                name, fixed = _place(rule, chosen, texts, mesh, values, ranges)
                order = (*(n for block, key in keys[index] for n in (block, chosen.get(key, -1))), index, at)
                stored.append(Stored(index, name, fixed, parts, order))
    for alias, target in tied.items():
        if target not in shapes or target in tied:
            raise LayoutRefused(
                f"line {layout.rules[owner[alias]].line}: {alias} is tied to {target}, which is not stored",
                rule=layout.rules[owner[alias]].line,
                tensor=alias,
            )
    stored.sort(key=lambda array: array.order)
    return Claims(tuple(stored), tied, tuple(dropped), tuple(sorted(idle)), owner)


Context = tuple[dict[str, int], tuple[str, ...]]


def _arrays(
    rule: Rule,
    index: int,
    layout: Layout,
    mesh: Mesh,
    values: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    owner: Mapping[str, int],
) -> Iterator[tuple[dict[str, int], tuple[str, ...], tuple[Part, ...]]]:
    """(values of the name's indices, texts, parts) of each array of the rule."""
    pieces = rule.pieces or (rule.name,)
    bound = naming.indices(rule.name)
    stacked = _stacked(rule, pieces)
    is_wild = any(map(naming.wilds, (*pieces, rule.name)))
    missing: str | None = None
    some = False
    for chosen, texts in _contexts(rule, pieces, shapes, values):
        parts = tuple(_parts(rule, pieces, stacked, chosen, texts, values))
        absent = [part.tensor for part in parts if part.tensor not in shapes]
        if absent:
            missing = missing or absent[0]
            some = some or len(absent) < len(parts)
            continue
        if is_wild and not all(_fits(rule, len(shapes[part.tensor]) + len(part.picks)) for part in parts):
            continue
        before = {owner[part.tensor] for part in parts if part.tensor in owner}
        if before and _gives_way(rule, index, parts, layout, owner):
            continue
        some = True
        yield {name.id: chosen[name.id] for name in bound}, texts, parts
    if some and missing is not None:
        raise LayoutRefused(
            f"line {rule.line}: {naming.show(rule.name)} needs the logical tensor {missing}, "
            "which does not exist",
            rule=rule.line,
            tensor=missing,
            why="other tensors of this rule do",
            next="check the layout's parameters (number of layers, of experts) against the model",
        )


def _fits(rule: Rule, dims: int) -> bool:
    """Whether a tensor of so many dimensions fits the axes: `* : [_@dp, ...]` is for those with some."""
    if rule.axes is None:
        return True
    if rule.axes and isinstance(rule.axes[-1], Rest):
        return dims >= len(rule.axes) - 1
    return dims == len(rule.axes)


def _gives_way(
    rule: Rule, index: int, parts: tuple[Part, ...], layout: Layout, owner: Mapping[str, int]
) -> bool:
    """Whether a more specific rule has all parts already; refuses where it has some, or an equal rule one."""
    taken = [part.tensor for part in parts if part.tensor in owner]
    other = layout.rules[owner[taken[0]]]
    if len(taken) == len(parts) and _rank(other) > _rank(rule) and owner[taken[0]] != index:
        return True
    raise _twice(taken[0], other, rule)


def _twice(tensor: str, first: Rule, second: Rule) -> LayoutRefused:
    return LayoutRefused(
        f"{tensor} is claimed twice, by line {first.line} ({naming.show(first.name)}) "
        f"and by line {second.line} ({naming.show(second.name)})",
        rule=second.line,
        tensor=tensor,
        next="let one rule claim it",
    )


def _contexts(
    rule: Rule, pieces: tuple[Pattern, ...], shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, int]
) -> Iterator[Context]:
    """Every choice of the name's indices and texts; with `*`, those that some logical tensor has."""
    bound = [name.id for name in naming.indices(rule.name)]
    if not any(naming.wilds(piece) for piece in (*pieces, rule.name)):
        counts = [number(Name(name), values) for name in bound]
        for point in product(*map(range, counts)):
            yield dict(zip(bound, point, strict=True)), ()
        return
    if any(naming.wilds(piece) != naming.wilds(rule.name) for piece in pieces):
        raise LayoutRefused(
            f"line {rule.line}: {naming.show(rule.name)} and its pieces have different numbers of *",
            rule=rule.line,
        )
    seen: set[tuple[tuple[int, ...], tuple[str, ...]]] = set()
    for chosen, texts in naming.match(pieces[0], list(shapes), values):
        if any(name not in chosen for name in bound):
            raise LayoutRefused(
                f"line {rule.line}: every index of {naming.show(rule.name)} must be in its pieces too",
                rule=rule.line,
            )
        key = (tuple(chosen[name] for name in bound), texts)
        if key not in seen:
            seen.add(key)
            yield {name: chosen[name] for name in bound}, texts


def _parts(
    rule: Rule,
    pieces: tuple[Pattern, ...],
    stacked: Mapping[str, int],
    chosen: Mapping[str, int],
    texts: tuple[str, ...],
    values: Mapping[str, int],
) -> Iterator[Part]:
    transposed = any(isinstance(verb, Transposed) for verb in rule.verbs)
    for point in product(*(range(number(Name(name), values)) for name in stacked)):
        inner = dict(zip(stacked, point, strict=True))
        picks = tuple(sorted((stacked[name], value) for name, value in inner.items()))
        for label, piece in enumerate(pieces):
            name = naming.logical(piece, {**chosen, **inner}, texts, values)
            yield Part(name, label, picks, transposed)


def _stacked(rule: Rule, pieces: tuple[Pattern, ...]) -> dict[str, int]:
    """Indices of the pieces that are dimensions of the stored tensor: `[e, f, h] = experts.{e}.gate`.

    Raises: LayoutRefused: an index is in neither the name nor the axes, or the pieces do not match the sums.
    """
    bound = {name.id for name in naming.indices(rule.name)}
    axes = rule.axes or ()
    bare = {_bare(axis): dim for dim, axis in enumerate(axes) if isinstance(axis, Axis) and _bare(axis)}
    stacked = {}
    for name in dict.fromkeys(index.id for piece in pieces for index in naming.indices(piece)):
        if name in bound:
            continue
        if name not in bare:
            raise LayoutRefused(
                f"line {rule.line}: {{{name}}} is an index of a piece, but neither of the name "
                f"{naming.show(rule.name)} nor a dimension of its own",
                rule=rule.line,
            )
        stacked[name] = bare[name]
    labels = 1
    for axis in axes:
        if isinstance(axis, Axis):
            labels *= _labels(axis)
    if labels != len(pieces):
        raise LayoutRefused(
            f"line {rule.line}: {naming.show(rule.name)} has {labels} summands and {len(pieces)} pieces",
            rule=rule.line,
            next="give one piece for each summand, in their order",
        )
    return stacked


def _bare(axis: Axis) -> str:
    """The name of an axis that is one named extent, split or padded at most."""
    while isinstance(axis, (Split, Pad)):
        axis = axis.axis
    if isinstance(axis, ProductOf) and len(axis.factors) == 1:
        return _bare(axis.factors[0])
    return axis.size.id if isinstance(axis, Extent) and isinstance(axis.size, Name) else ""


def _labels(axis: Axis) -> int:
    if isinstance(axis, (Split, Pad)):
        return _labels(axis.axis)
    if isinstance(axis, Sum):
        return len(axis.parts)
    count = 1
    if isinstance(axis, ProductOf):
        for factor in axis.factors:
            count *= _labels(factor)
    return count


def _place(
    rule: Rule,
    chosen: Mapping[str, int],
    texts: tuple[str, ...],
    mesh: Mesh,
    values: Mapping[str, int],
    ranges: dict[Index, naming.Range],
) -> tuple[str, Mapping[str, int] | None]:
    """The array's name at its holders, and the coordinates that make a place a holder."""
    numbers: dict[str, int | str] = {}
    wanted: list[tuple[str, int]] = []
    for index in naming.indices(rule.name):
        if index not in ranges:
            ranges[index] = naming.index_range(index, values, mesh.sizes)
        held = ranges[index]
        numbers[index.id] = held.local[chosen[index.id]]
        wanted.extend(held.holders[chosen[index.id]].items())
    for verb in rule.verbs:
        if isinstance(verb, On):
            if verb.axis not in mesh.sizes:
                raise LayoutRefused(f"line {rule.line}: on {verb.axis}: no such mesh axis", rule=rule.line)
            wanted.append((verb.axis, number(verb.coordinate, values)))
    fixed = dict(wanted)
    possible = all(fixed[axis] == at and 0 <= at < mesh.sizes[axis] for axis, at in wanted)
    return naming.fill(rule.name, numbers, texts), fixed if possible else None


def _rank(rule: Rule) -> tuple[int, int]:
    patterns = (rule.name, *rule.pieces)
    literal = sum(len(part.value) for part in (rule.pieces or (rule.name,))[0] if isinstance(part, Text))
    return (0, literal) if any(map(naming.wilds, patterns)) else (1, 0)


def _order_keys(rules: tuple[Rule, ...]) -> list[list[tuple[int, str]]]:
    """For each rule (block, index id) by level: sorting by (block, index value, ...) nests as a module does.

    Consecutive rules whose names agree up to an index are one block: all of layer 0, then all of layer 1.
    """
    keys: list[list[tuple[int, str]]] = [[] for _ in rules]
    heads = [[_head(rule.name, level) for level in range(len(naming.indices(rule.name)))] for rule in rules]
    depth = max(map(len, heads), default=0)
    for level in range(depth):
        for at, head in enumerate(heads):
            if level >= len(head):
                continue
            same = (
                at > 0
                and level < len(heads[at - 1])
                and heads[at - 1][level] == head[level]
                and [block for block, _ in keys[at - 1][:level]] == [block for block, _ in keys[at][:level]]
            )
            keys[at].append(keys[at - 1][level] if same else (at, head[level][-1]))
    return [key or [(at, "")] for at, key in enumerate(keys)]


def _head(pattern: Pattern, level: int) -> tuple[str, ...]:
    """The pattern up to its index number `level`."""
    parts: list[str] = []
    for part in pattern:
        parts.append(part.value if isinstance(part, Text) else part.id if isinstance(part, Index) else "*")
        if isinstance(part, Index):
            if level == 0:
                break
            level -= 1
    return tuple(parts)
