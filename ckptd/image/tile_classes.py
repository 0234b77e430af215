"""Tiles of stored tensors, written once for all tensors that lie alike."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ckptd.image import columns
from ckptd.image.fields import Fields, MalformedField
from ckptd.layout.distinct import distinct
from ckptd.layout.tiles import Ints, Tiles

MAX_DIMS: Final = 64
MAX_BOXES: Final = 1 << 22  # of one class
MAX_NUMBERS: Final = 1 << 23  # of all classes together: 64 MiB when unpacked
_MAX_ARRAYS: Final = 1 << 16
_VECTORS: Final = ("offsets", "sizes", "strides")
_SCALARS: Final = ("place", "array", "start", "cover")


@dataclass(frozen=True, eq=False)
class TileClass:
    """Boxes as in `Tiles`, for every tensor of the shapes that `check` accepts."""

    offsets: Ints  # [n, d]
    sizes: Ints  # [n, d]
    strides: Ints  # [n, d]
    place: Ints  # [n]: index of the object
    array: Ints  # [n]
    start: Ints  # [n]
    cover: Ints  # [n]
    arrays: tuple[str, ...]  # "*SUFFIX": the tensor's own name and a suffix; "=NAME"

    def of(self, name: str, shape: tuple[int, ...]) -> Tiles:
        """Returns the tiles of the tensor `name`."""
        arrays = tuple(name + text[1:] if text[0] == "*" else text[1:] for text in self.arrays)
        return Tiles(
            shape,
            self.offsets,
            self.sizes,
            self.place,
            self.array,
            self.start,
            self.strides,
            self.cover,
            arrays,
        )

    @classmethod
    def from_tiles(cls, name: str, tiles: Tiles) -> TileClass:
        """Returns the class of a tensor's tiles, with its boxes in the order that writes shortest."""
        arrays = tuple(
            "*" + text[len(name) :] if text.startswith(name) else "=" + text for text in tiles.arrays
        )
        keys = [tiles.place, *tiles.sizes.T, *tiles.strides.T, tiles.cover]
        order = np.lexsort(keys)
        t = tiles.at(order)
        return cls(t.offsets, t.sizes, t.strides, t.place, t.array, t.start, t.cover, arrays)

    def key(self) -> tuple[Any, ...]:
        """What two equal classes have in common."""
        vectors = (self.offsets, self.sizes, self.strides, self.place, self.array, self.start, self.cover)
        return (self.offsets.shape, self.arrays, *(v.tobytes() for v in vectors))

    def check(self, what: str, shape: tuple[int, ...]) -> None:
        """Returns if every box lies inside `shape`, and every cover fills it exactly.

        Raises:
            MalformedField: one does not.
        """
        if self.offsets.shape[1] != len(shape):
            raise MalformedField(f"{what} has {len(shape)} dims, its tiles have {self.offsets.shape[1]}")
        if len(self.place) == 0:
            if math.prod(shape):
                raise MalformedField(f"{what} has no tiles")
            return
        ends = self.offsets + self.sizes
        if (self.sizes < 1).any() or (ends > np.array(shape, np.int64)).any():
            raise MalformedField(f"{what} has a tile that is empty or beyond its shape {list(shape)}")
        # In floats, which do not wrap: where the last element of each box lies in its array.
        last = self.start + ((self.sizes - 1) * self.strides.astype(np.float64)).sum(axis=1)
        if (last > columns.MAX_NUMBER).any() or ((self.strides == 0) & (self.sizes > 1)).any():
            raise MalformedField(f"{what} has a tile whose strides are 0 or lead beyond any file")
        if not _fills(self.offsets, ends, self.cover, shape):
            raise MalformedField(f"{what} has tiles that overlap or leave a part of it out")


def write_class(tiles: TileClass) -> dict[str, Any]:
    """Returns the class's JSON object."""
    n, d = tiles.offsets.shape
    covers = int(tiles.cover.max()) + 1 if n else 0
    found: dict[str, Any] = {"arrays": tiles.arrays, "boxes": n, "dims": d, "covers": covers}
    for key in _VECTORS:
        found[key] = [columns.pack(column) for column in getattr(tiles, key).T]
    for key in _SCALARS:
        found[key] = columns.pack(getattr(tiles, key))
    return found


def read_classes(items: Sequence[object], objects: int) -> tuple[TileClass, ...]:
    """Returns the classes of a manifest with so many objects.

    Raises:
        MalformedField: one is none, or they are beyond the limits together.
    """
    total, found = 0, []
    for number, item in enumerate(items):
        given = Fields(item, f"class {number}")
        n, d = given.number("boxes", MAX_BOXES), given.number("dims", MAX_DIMS)
        total += n * (len(_VECTORS) * d + len(_SCALARS))
        if total > MAX_NUMBERS:
            raise MalformedField(f"its classes hold more than {MAX_NUMBERS} numbers")
        found.append(_class(given, n, d, objects))
    return tuple(found)


def _class(given: Fields, n: int, d: int, objects: int) -> TileClass:
    covers = given.number("covers", MAX_BOXES)
    arrays = tuple(given.items("arrays", _MAX_ARRAYS))
    if any(type(text) is not str or text[:1] not in ("*", "=") or len(text) > 600 for text in arrays):
        raise MalformedField(f"{given.what} has an array's name that begins neither with * nor =")
    try:
        vectors = {key: _matrix(given.items(key, MAX_DIMS), n, d) for key in _VECTORS}
        scalars = {key: columns.unpack(given.take(key), n) for key in _SCALARS}
    except ValueError as error:
        raise MalformedField(f"{given.what} has a column that cannot be read: {error}") from error
    given.done()
    for key, most in (("place", objects), ("array", len(arrays)), ("cover", covers)):
        if n and int(scalars[key].max()) >= most:
            raise MalformedField(f"{given.what} names {key} {scalars[key].max()}, there are {most}")
    return TileClass(**vectors, **scalars, arrays=arrays)


def _matrix(value: list[Any], n: int, d: int) -> Ints:
    if len(value) != d:
        raise ValueError(f"{len(value)} columns, expected {d}")
    found = np.empty((n, d), np.int64)
    for dim, column in enumerate(value):
        found[:, dim] = columns.unpack(column, n)
    return found


def _fills(begins: Ints, ends: Ints, cover: Ints, shape: tuple[int, ...]) -> bool:
    """Whether the boxes of every cover tile `shape`; wrong with a probability below 2**-40, never
    foreseeably.

    Every index x of dim d weighs a random w_d[x]; an element weighs the product, modulo 2**64.  If
    every element
    is in one box, the boxes' weights add up to that of the whole; if one is not, only by chance.  A box
    weighs the product of
    differences of prefix sums, and only the cuts matter, so the intervals between them are weighed.
    """
    weight = np.ones(len(begins), np.uint64)
    whole = np.uint64(1)
    for dim, size in enumerate(shape):
        cuts = distinct(np.concatenate([begins[:, dim], ends[:, dim], [0, size]]))
        random = np.frombuffer(secrets.token_bytes(8 * (len(cuts) - 1)), np.uint64)
        sums: NDArray[np.uint64] = np.zeros(len(cuts), np.uint64)
        np.cumsum(random, out=sums[1:])
        at = [np.searchsorted(cuts, edge) for edge in (begins[:, dim], ends[:, dim])]
        weight *= sums[at[1]] - sums[at[0]]
        with np.errstate(over="ignore"):
            whole = whole * sums[-1]
    covers = int(cover.max()) + 1
    totals = np.zeros(covers, np.uint64)
    np.add.at(totals, cover, weight)
    return bool((totals == whole).all())
