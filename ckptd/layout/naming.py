"""Names with axes: which place holds which index of `{l@pp}`, and what the tensors there are called.

An index `{l@pp}` in a rule's name counts 0 .. l - 1, shared over the grid like a dimension; a place numbers
its own from `start`.  Pieces carry the global number.  An axis of the grid that is no mesh axis but a
parameter (virtual stages) belongs to every place: it holds the shares of all its indices, numbered one after
another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from ckptd.errors import LayoutRefused
from ckptd.layout.arithmetic import evaluate as number
from ckptd.layout.expressions import Extent, Index, Name, Number, Pattern, Split, Text, Wild
from ckptd.layout.runs import evaluate as sequence


@dataclass(frozen=True)
class Range:
    """The values 0 .. count - 1 of one index: for each, who holds it and what number it has there."""

    holders: tuple[
        Mapping[str, int], ...
    ]  # [count] the coordinates that a place must have to hold this value
    local: tuple[int, ...]  # [count] the place's own number, from `start`


def index_range(index: Index, values: Mapping[str, int], mesh_sizes: Mapping[str, int]) -> Range:
    """Who holds which value of an index of a rule's name.

    Args:
        values: every name's value, mesh sizes included; that of `index.id` is the index's count.
        mesh_sizes: the sizes of mesh axes, folded ones included.

    Raises: LayoutRefused: the index has no count, or the grid or the widths do not fit.
    """
    count, start = number(Name(index.id), values), number(index.start, values)
    if not index.grid:
        return Range(tuple({} for _ in range(count)), tuple(range(start, start + count)))
    axis = Split(Extent(Number(count)), index.grid, index.widths)
    mine = [name for name in index.grid if name in mesh_sizes]
    holders: list[Mapping[str, int]] = [{}] * count
    local = [0] * count
    for point in product(*(range(mesh_sizes[name]) for name in mine)):
        coordinates = dict(zip(mine, point, strict=True))
        runs = sequence(axis, values, coordinates)
        held = [
            n for a, k in zip(runs.start.tolist(), runs.length.tolist(), strict=True) for n in range(a, a + k)
        ]
        for position, value in enumerate(held):
            holders[value], local[value] = coordinates, start + position
    return Range(tuple(holders), tuple(local))


def indices(pattern: Pattern) -> tuple[Index, ...]:
    """The pattern's indices, each id once, in order."""
    found: dict[str, Index] = {}
    for part in pattern:
        if isinstance(part, Index):
            found.setdefault(part.id, part)
    return tuple(found.values())


def wilds(pattern: Pattern) -> int:
    """How many `*` the pattern has."""
    return sum(isinstance(part, Wild) for part in pattern)


def fill(pattern: Pattern, numbers: Mapping[str, int | str], texts: Sequence[str] = ()) -> str:
    """The name with these numbers for its indices and these texts for its `*`, in order.

    Raises: LayoutRefused: an index has no number here.
    """
    rest = iter(texts)
    parts = []
    for part in pattern:
        if isinstance(part, Text):
            parts.append(part.value)
        elif isinstance(part, Wild):
            parts.append(next(rest, "*"))
        elif part.id not in numbers:
            raise LayoutRefused(
                f"{show(pattern)}: {{{part.id}}} has no value here",
                next=f"known here: {', '.join(sorted(numbers))}",
            )
        else:
            parts.append(str(numbers[part.id]).zfill(part.digits))
    return "".join(parts)


def logical(
    pattern: Pattern, chosen: Mapping[str, int], texts: Sequence[str], values: Mapping[str, int]
) -> str:
    """A logical tensor's name: the global values, each counted from the `start` that its index has there."""
    written = [
        Text(str(chosen[part.id] + number(part.start, values)).zfill(part.digits))
        if isinstance(part, Index)
        else part
        for part in pattern
    ]
    return fill(tuple(written), {}, texts)


def show(pattern: Pattern) -> str:
    """The pattern as the language spells it, for messages."""
    shown = []
    for part in pattern:
        if isinstance(part, Text):
            shown.append(part.value)
        elif isinstance(part, Wild):
            shown.append("*")
        else:
            grid = (
                f"@{part.grid[0]}"
                if len(part.grid) == 1
                else f"@({'*'.join(part.grid)})"
                if part.grid
                else ""
            )
            shown.append(f"{{{part.id}{grid}}}")
    return "".join(shown)


def match(
    pattern: Pattern, names: Sequence[str], values: Mapping[str, int]
) -> Iterator[tuple[dict[str, int], tuple[str, ...]]]:
    """For each name of this pattern: the values of its indices, and the texts that its `*` stand for.

    A number beyond its index's count matches nothing.
    """
    parts: list[str] = []
    order: list[tuple[str, int]] = []
    for part in pattern:
        if isinstance(part, Text):
            parts.append(re.escape(part.value))
        elif isinstance(part, Wild):
            parts.append("(.*)")
            order.append(("*", 0))
        else:
            parts.append(r"(\d+)")
            order.append((part.id, number(part.start, values)))
    expression = re.compile("".join(parts))
    counts = {index.id: number(Name(index.id), values) for index in indices(pattern)}
    for name in names:
        found = expression.fullmatch(name)
        if found is None:
            continue
        groups = list(zip(order, found.groups(), strict=True))
        chosen = {key: int(text) - start for (key, start), text in groups if key != "*"}
        texts = tuple(text for (key, _), text in groups if key == "*")
        within = all(0 <= value < counts[key] for key, value in chosen.items())
        if within and logical(pattern, chosen, texts, values) == name:
            yield chosen, texts
