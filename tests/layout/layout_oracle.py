"""The slow obvious check of a placement: local arrays made by numpy alone, against what the tiles say."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ckptd.layout.expressions import (
    Axis,
    Extent,
    Index,
    Layout,
    Name,
    Number,
    Pattern,
    Product,
    Rep,
    Split,
    Sum,
    Text,
    Wild,
)
from ckptd.layout.resolve import Placement

Arrays = dict[str, NDArray[np.int64]]
FILL, UNTOUCHED = -1, -2


def iota(shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Logical tensors of which every element has a number of its own."""
    marked, first = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        marked[name] = np.arange(first, first + size, dtype=np.int64).reshape(shape)
        first += size
    return marked


def scatter(placement: Placement, logical: Arrays, place: int, *, only: bool) -> Arrays:
    """A place's arrays, written through the tiles (`only` asks for that place alone) and the fillers."""
    arrays = {name: np.full(shape, UNTOUCHED) for name, shape in placement.arrays(place).items()}
    for name, whole in logical.items():
        tiles = placement.tiles(name, [place]) if only else placement.tiles(name)
        for i in np.flatnonzero(tiles.place == place):
            box = whole[tuple(slice(a, a + n) for a, n in zip(tiles.offsets[i], tiles.sizes[i], strict=True))]
            assert box.size > 0
            flat = arrays[tiles.arrays[tiles.array[i]]].reshape(-1)
            for at in np.ndindex(*box.shape):
                position = int(tiles.start[i] + np.dot(at, tiles.strides[i]))
                assert flat[position] == UNTOUCHED, f"{name} writes {position} at {place} a second time"
                flat[position] = box[at]
    for filler in placement.fillers(place):
        flat = arrays[filler.array].reshape(-1)
        for at in np.ndindex(*filler.sizes):
            position = filler.start + int(np.dot(at, filler.strides))
            assert flat[position] == UNTOUCHED
            flat[position] = FILL
    return arrays


def compare(placement: Placement, logical: Arrays, expected: Mapping[int, Arrays]) -> int:
    """Asserts that every place's arrays are those expected (filler is -1); counts the elements compared."""
    count = 0
    for place in range(placement.mesh.size):
        for only in (True, False):
            found = scatter(placement, logical, place, only=only)
            assert list(found) == list(expected[place]) or set(found) == set(expected[place])
            for name, array in expected[place].items():
                np.testing.assert_array_equal(found[name], array, err_msg=f"{name} at place {place}")
                count += array.size
    return count


def padded(array: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """Filler at the end of dim 0."""
    more = -len(array) % multiple
    return np.concatenate([array, np.full((more, *array.shape[1:]), FILL)]) if more else array


def chunk(array: NDArray[np.int64], ranks: int, rank: int, dim: int = 0) -> NDArray[np.int64]:
    """torch.chunk's rule, written out: pieces of ceil(n / ranks) until nothing is left."""
    width = -(-array.shape[dim] // ranks)
    pieces = [
        np.take(array, range(begin, min(begin + width, array.shape[dim])), axis=dim)
        for begin in (range(0, array.shape[dim], width) if width else [])
    ]
    return pieces[rank] if rank < len(pieces) else np.take(array, range(0), axis=dim)


# --- short hands for layouts, as the language's parser would make them
# ---------------------------------------------


def size(value: int | str) -> Name | Number:
    return Name(value) if isinstance(value, str) else Number(value)


def ext(value: int | str) -> Extent:
    return Extent(size(value))


def prod(*factors: Axis) -> Product:
    return Product(factors)


def total(**parts: int | str) -> Sum:
    return Sum(tuple((label, size(count)) for label, count in parts.items()))


def split(axis: Axis, *grid: str, widths: tuple[int, ...] | None = None) -> Split:
    return Split(axis, grid, widths)


def rep(*grid: str) -> Rep:
    return Rep(grid)


def name(text: str, **grids: tuple[str, ...]) -> Pattern:
    """`a.{l}.*` as a pattern; `l=("pp",)` gives the index a grid."""
    parts: list[Text | Index | Wild] = []
    rest = text
    while rest:
        if rest[0] == "{":
            id, _, rest = rest[1:].partition("}")
            id, _, digits = id.partition(":")
            parts.append(Index(id, grids.get(id, ()), digits=int(digits or 0)))
        elif rest[0] == "*":
            parts.append(Wild())
            rest = rest[1:]
        else:
            end = min((rest.index(c) for c in "{*" if c in rest), default=len(rest))
            parts.append(Text(rest[:end]))
            rest = rest[end:]
    return tuple(parts)


def layout(mesh: tuple[str, ...], *rules: object, **more: object) -> Layout:
    """A layout whose rules stand on lines 1, 2, ..."""
    from dataclasses import replace

    numbered = tuple(replace(rule, line=line) for line, rule in enumerate(rules, 1))  # type: ignore[type-var]
    return Layout(name="test", parameters=more.pop("parameters", ()), mesh=mesh, rules=numbered, **more)  # type: ignore[arg-type]
