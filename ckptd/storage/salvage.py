"""What still verifies of a damaged checkpoint: tensor after tensor, each whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ckptd.errors import CkptdError, CorruptCheckpoint
from ckptd.image.manifest import StoredTensor
from ckptd.layout import boxes
from ckptd.layout.distinct import distinct
from ckptd.layout.tiles import Tiles
from ckptd.storage.transfer import Job

if TYPE_CHECKING:
    from ckptd.storage.reading import Checkpoint

Values = NDArray[np.generic]


class Salvage:
    """Yields (name, values) of each tensor that verifies; those that do not are in `lost` afterwards.

    A tensor is put together from all its replicas, box by box, where none of them is whole.

    Args:
        make: (values, safetensors dtype code) -> what the caller gets.
    """

    def __init__(self, checkpoint: Checkpoint, make: Callable[[Any, str], Any]) -> None:
        self._checkpoint = checkpoint
        self._make = make
        self.lost: dict[str, str] = {}  # name -> why

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        self.lost.clear()
        for stored in self._checkpoint.manifest.tensors:
            try:
                values = self._whole(stored)
            except CkptdError as error:
                self.lost[stored.name] = str(error)
                continue
            yield stored.name, self._make(values, stored.dtype)

    def _whole(self, stored: StoredTensor) -> Values:
        tiles = self._checkpoint.tiles(stored.name)
        failure: CorruptCheckpoint | None = None
        for cover in distinct(tiles.cover):
            whole = _box(stored.shape, (0,) * len(stored.shape), stored.shape)
            try:
                return self._read(stored, whole, tiles.at(tiles.cover == cover))
            except CorruptCheckpoint as error:
                failure = failure or error
        if failure is None:
            return self._empty(stored, stored.shape)
        found = None if stored.differs else self._pieced(stored, tiles)
        if found is None:
            raise failure
        return found

    def _pieced(self, stored: StoredTensor, tiles: Tiles) -> Values | None:
        """The tensor out of the boxes of all replicas; None if they leave a part of it out."""
        values = self._empty(stored, stored.shape)
        filled = np.zeros(stored.shape, bool)
        for i in range(len(tiles)):
            low, sizes = tiles.offsets[i].tolist(), tiles.sizes[i].tolist()
            at = tuple(slice(begin, begin + size) for begin, size in zip(low, sizes, strict=True))
            if filled[at].all():
                continue
            source = tiles.at(tiles.cover == tiles.cover[i])
            try:
                values[at] = self._read(stored, _box(stored.shape, low, sizes), source)
            except CorruptCheckpoint:
                continue
            filled[at] = True
        return values if filled.all() else None

    def _read(self, stored: StoredTensor, target: Tiles, source: Tiles) -> Values:
        values = self._empty(stored, tuple(target.sizes[0].tolist()))
        job = Job(self._checkpoint)
        job.want(stored.name, target, {target.arrays[0]: values.reshape(-1)}, source=source)
        job.run()
        return values

    def _empty(self, stored: StoredTensor, shape: tuple[int, ...]) -> Values:
        from ckptd.storage.reading import numpy_dtype

        return np.zeros(shape, numpy_dtype(stored.dtype))


def _box(shape: tuple[int, ...], offset: Any, sizes: Any) -> Tiles:
    def row(values: Any) -> NDArray[np.int64]:
        return np.array([list(values)], np.int64).reshape(1, len(shape))

    zero = np.zeros(1, np.int64)
    strides = boxes.row_major(tuple(sizes))
    return Tiles(shape, row(offset), row(sizes), zero, zero, zero, row(strides), zero, ("values",))
