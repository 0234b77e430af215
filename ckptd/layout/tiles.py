"""Tiles: boxes of one logical tensor, and where each lies in the array that holds it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tiles:
    """n boxes of one logical tensor with d dimensions.

    Element x of the logical tensor, in box i, is element `start[i] + sum((x - offsets[i]) * strides[i])` of
    the flat array `arrays[array[i]]` at place `place[i]`.  Products, fused tensors, flat buffers and
    DTensors all come down to this; a flat range of an n-dimensional tensor is a few boxes.

    Replicas are whole: the boxes of one `cover` tile the logical tensor exactly (that is the proof's
    obligation), so a reader may take any one cover.
    """

    shape: tuple[int, ...]  # of the logical tensor
    offsets: Ints  # [n, d], elements
    sizes: Ints  # [n, d], elements; no box is empty
    place: Ints  # [n]: a rank, or the index of a file
    array: Ints  # [n]: index into `arrays`
    start: Ints  # [n], elements
    strides: Ints  # [n, d], elements
    cover: Ints  # [n]: 0 .. covers - 1
    arrays: tuple[str, ...]  # names of the arrays within a place

    def __len__(self) -> int:
        return len(self.place)

    def at(self, chosen: NDArray[np.bool_] | Ints) -> Tiles:
        """The boxes that a mask or an index selects."""
        return Tiles(
            self.shape,
            self.offsets[chosen],
            self.sizes[chosen],
            self.place[chosen],
            self.array[chosen],
            self.start[chosen],
            self.strides[chosen],
            self.cover[chosen],
            self.arrays,
        )
