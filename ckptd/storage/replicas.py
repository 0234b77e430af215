"""What replicas have of the bytes of one stored file, wherever they lie in theirs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ckptd.errors import CorruptCheckpoint
from ckptd.image import ImagePlan
from ckptd.image.digest_table import BLOCK_BYTES
from ckptd.image.manifest import StoredTensor
from ckptd.layout import boxes
from ckptd.layout.distinct import distinct
from ckptd.layout.tiles import Tiles
from ckptd.storage.reading import Checkpoint, numpy_dtype
from ckptd.storage.transfer import Job

Arrays = dict[str, list[tuple[StoredTensor, Tiles]]]  # which logical tensors lie in each array of a file


class Replicas:
    """Rebuilds blocks of one file from other covers of the tensors that lie in them."""

    def __init__(self, checkpoint: Checkpoint, index: int, layout: ImagePlan) -> None:
        self._checkpoint = checkpoint
        self._index = index
        self._plan = layout
        self._arrays = arrays_of(checkpoint, index)

    def block(self, block: int, known: bytes) -> bytes:
        """Returns a block with all that other covers have of it, and what is `known` of it elsewhere.

        The caller compares it with its digest.
        """
        begin = block * BLOCK_BYTES
        end = begin + len(known)
        data = bytearray(known)
        for spec in self._plan.tensors:
            at = self._plan.offset_of[spec.name]
            low, high = max(begin, at), min(end, at + spec.nbytes)
            if low >= high:
                continue
            if spec.name.startswith("__ckptd.pad"):
                data[low - begin : high - begin] = bytes(high - low)
            for stored, tiles in self._arrays.get(spec.name, []):
                found = self._range(stored, tiles, spec.name, low - at, high - at)
                for first, piece in found:
                    data[at + first - begin : at + first - begin + len(piece)] = piece
        return bytes(data)

    def _range(
        self, stored: StoredTensor, tiles: Tiles, array: str, low: int, high: int
    ) -> list[tuple[int, bytes]]:
        """What other covers have of the bytes low .. high - 1 of an array: (first byte, bytes) each."""
        width = numpy_dtype(stored.dtype).itemsize
        mine = tiles.at((tiles.place == self._index) & _named(tiles, array))
        found = []
        for box in _boxes(mine, low // width, -(-high // width)):
            target, first, count = box
            values = self._read(stored, tiles, int(mine.cover[0]), target, count)
            if values is not None:
                data = values.tobytes()
                skip = max(0, low - first * width)
                found.append((first * width + skip, data[skip : max(skip, high - first * width)]))
        return found

    def _read(
        self, stored: StoredTensor, tiles: Tiles, own: int, target: Tiles, count: int
    ) -> NDArray[np.generic] | None:
        if stored.differs:  # ranks hold different values: another's are not this one's
            return None
        for cover in distinct(tiles.cover):
            values: NDArray[np.generic] = np.zeros(count, numpy_dtype(stored.dtype))
            job = Job(self._checkpoint, threads=1)
            job.want(stored.name, target, {target.arrays[0]: values}, source=tiles.at(tiles.cover == cover))
            try:
                job.run()
            except CorruptCheckpoint:  # damaged there too, or this cover is the damaged one
                continue
            return values
        return None


def _boxes(mine: Tiles, low: int, high: int) -> Iterator[tuple[Tiles, int, int]]:
    """Yields boxes for elements low .. high - 1 of an array: (one box, its first element, elements).

    Boxes that do not lie row-major are left out, their elements with them.
    """
    for i in range(len(mine)):
        sizes = tuple(int(n) for n in mine.sizes[i])
        start, count = int(mine.start[i]), int(np.prod(sizes))
        if tuple(mine.strides[i].tolist()) != boxes.row_major(sizes) and count > 1:
            continue
        first, stop = max(low, start), min(high, start + count)
        if first >= stop:
            continue
        inner, extent = boxes.of_range(sizes, first - start, stop - start)
        at = first
        for offset, size in zip(inner, extent, strict=True):
            elements = int(np.prod(size))
            zero = np.zeros(1, np.int64)
            strides = np.array([boxes.row_major(tuple(size.tolist()))], np.int64).reshape(1, len(sizes))
            target = Tiles(
                mine.shape,
                (mine.offsets[i] + offset).reshape(1, -1),
                size.reshape(1, -1),
                zero,
                zero,
                zero,
                strides,
                zero,
                ("block",),
            )
            yield target, at, elements
            at += elements


def arrays_of(checkpoint: Checkpoint, index: int) -> Arrays:
    """The tensors of each array of one file."""
    if checkpoint.manifest.form == "files":
        return {}
    found: Arrays = {}
    for stored in checkpoint.manifest.tensors:
        tiles = checkpoint.tiles(stored.name)
        for number in distinct(tiles.array[tiles.place == index]):
            found.setdefault(tiles.arrays[number], []).append((stored, tiles))
    return found


def _named(tiles: Tiles, array: str) -> NDArray[np.bool_]:
    numbers = [number for number, name in enumerate(tiles.arrays) if name == array]
    return np.isin(tiles.array, numbers)
