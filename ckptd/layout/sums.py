"""Fingerprints of logical tensors, read through a layout: sums over boxes, which places may take apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from ckptd.errors import LayoutRefused
from ckptd.layout.fingerprint import Kernel, add, fingerprint
from ckptd.layout.resolve import Placement
from ckptd.layout.tiles import Tiles

# (place, array) -> its elements, 1-D and contiguous, all arrays of a tensor of one dtype.  It is asked for an
# array once per tensor that has a part in it.
Read = Callable[[int, str], NDArray[np.generic]]

_BITS: dict[int, np.dtype[np.generic]] = {
    **{width: np.dtype(f"u{width}") for width in (1, 2, 4, 8)},
    16: np.dtype([("low", "u8"), ("high", "u8")]),
}


@dataclass(frozen=True)
class Sum:
    """What was read of one replica of a tensor; those of disjoint parts, from many places, add up."""

    fingerprint: int
    elements: int
    width: int  # bytes of an element
    value: bytes | None  # the bits that all of these elements have; None where they differ

    def __add__(self, other: Sum) -> Sum:
        if self.width != other.width:
            raise ValueError(f"parts of one tensor have elements of {self.width} and of {other.width} bytes")
        return Sum(
            add([self.fingerprint, other.fingerprint]),
            self.elements + other.elements,
            self.width,
            self.value if self.value == other.value else None,
        )


Sums = Mapping[str, Mapping[int, Sum]]  # tensor -> cover -> what was read of it


def read_sums(
    placement: Placement,
    read: Read,
    *,
    names: Iterable[str] | None = None,
    places: Iterable[int] | None = None,
    every_replica: bool = True,
    kernel: Kernel | None = None,
) -> dict[str, dict[int, Sum]]:
    """The fingerprints of what places hold; each place may take its own, and `merge` puts them together.

    Args:
        names: all tensors by default.
        places: all by default.
        every_replica: False reads one replica only.
        kernel: as of `fingerprint`.

    Raises:
        LayoutRefused: an array is too short for its boxes.
        ValueError: a name is unknown, or an array is not flat, or not of its tensor's dtype.
    """
    where = None if places is None else tuple(places)
    found: dict[str, dict[int, Sum]] = {}
    for name in placement.names if names is None else names:
        tiles = placement.tiles(name, where)
        if not every_replica and len(tiles):
            tiles = tiles.at(tiles.cover == tiles.cover.min())
        by_cover: dict[int, Sum] = {}
        for cover, part in _parts(tiles, read, kernel):
            by_cover[cover] = by_cover[cover] + part if cover in by_cover else part
        found[name] = by_cover
    return found


def merge(parts: Iterable[Sums]) -> dict[str, dict[int, Sum]]:
    """What disjoint sets of places read, put together.  Raises: ValueError: of different dtypes."""
    found: dict[str, dict[int, Sum]] = {}
    for part in parts:
        for name, by_cover in part.items():
            mine = found.setdefault(name, {})
            for cover, one in by_cover.items():
                mine[cover] = mine[cover] + one if cover in mine else one
    return found


def whole(placement: Placement, found: Sums, name: str) -> dict[int, Sum]:
    """The replicas of a tensor that were read whole; of one without elements there is nothing to read."""
    volume = prod(placement.shape(name))
    return {cover: each for cover, each in sorted(found.get(name, {}).items()) if each.elements == volume}


def transposed(tiles: Tiles, read: Read) -> int:
    """The fingerprint of the transpose of what these boxes hold."""
    turned = replace(
        tiles,
        shape=tiles.shape[::-1],
        offsets=tiles.offsets[:, ::-1],
        sizes=tiles.sizes[:, ::-1],
        strides=tiles.strides[:, ::-1],
    )
    return add([part.fingerprint for _, part in _parts(turned, read, None)])


# --- boxes --------------------------------------------------------------------------------------------------


def _parts(tiles: Tiles, read: Read, kernel: Kernel | None) -> Iterator[tuple[int, Sum]]:
    """(cover, sum) of every box."""
    arrays: dict[tuple[int, int], NDArray[np.generic]] = {}
    for i in range(len(tiles)):
        key = (int(tiles.place[i]), int(tiles.array[i]))
        if key not in arrays:
            arrays[key] = read(key[0], tiles.arrays[key[1]])
            _check_flat(arrays[key], tiles.arrays[key[1]], key[0])
        box = _box(arrays[key], tiles, i)
        number = fingerprint(box, tiles.offsets[i].tolist(), kernel)
        yield int(tiles.cover[i]), Sum(number, box.size, box.itemsize, _value(box))


def _check_flat(array: NDArray[np.generic], name: str, place: int) -> None:
    if array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(f"array {name!r} of place {place} is not flat and contiguous")


def _box(array: NDArray[np.generic], tiles: Tiles, i: int) -> NDArray[np.generic]:
    """Box i as a view of its array."""
    start, sizes, strides = int(tiles.start[i]), tiles.sizes[i], tiles.strides[i]
    end = start + int(((sizes - 1) * strides).sum()) + 1
    if end > len(array):
        name = tiles.arrays[int(tiles.array[i])]
        raise LayoutRefused(
            f"{name} of place {tiles.place[i]} has {len(array)} elements, and the layout needs {end}",
            why="the volumes do not close",
        )
    width = array.itemsize
    shape = tuple(sizes.tolist())
    return np.ndarray(shape, array.dtype, array, start * width, tuple((strides * width).tolist()))


def _value(box: NDArray[np.generic]) -> bytes | None:
    """The bits that all elements of a box have."""
    bits = box.view(_BITS[box.itemsize])
    first = bits[(0,) * bits.ndim]
    if first != bits[(-1,) * bits.ndim] or not np.all(bits == first):
        return None
    return bytes(first.tobytes())
