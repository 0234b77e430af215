"""The compute kernel for machines without ISA-L: numpy and `bytes.translate`.

Correct anywhere, at about a twentieth of the speed of ISA-L; it holds the interpreter lock
while it translates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckptd.erasure.buffers import Span
from ckptd.erasure.galois import PRODUCT, Bytes

# Multiplication by c as a translation table of 256 bytes.  `bytes.translate` looks
# bytes up directly; indexing a numpy table would widen every index to 8 bytes first.
_TABLES: tuple[bytes, ...] = tuple(row.tobytes() for row in PRODUCT)

# Work goes in blocks that stay in a core's cache, so temporaries are bounded by
# (columns + 1) * BLOCK_BYTES whatever the length of the buffers.
BLOCK_BYTES = 1 << 16


class NumpyProduct:
    """Multiplication by one fixed matrix."""

    def __init__(self, matrix: Bytes) -> None:
        self._matrix: list[list[int]] = matrix.tolist()

    def write(self, sources: Sequence[Span], outputs: Sequence[Span]) -> None:
        """outputs = matrix x sources."""
        for start in range(0, outputs[0].array.size, BLOCK_BYTES):
            block = slice(start, start + BLOCK_BYTES)
            raw = [source.array[block].tobytes() for source in sources]
            for row, output in zip(self._matrix, outputs, strict=True):
                output.array[block] = 0
                for coefficient, data in zip(row, raw, strict=True):
                    _fold(coefficient, data, output.array[block])

    def fold(self, column: int, source: Span, outputs: Sequence[Span]) -> None:
        """outputs ^= matrix[:, column] x source."""
        for start in range(0, source.array.size, BLOCK_BYTES):
            block = slice(start, start + BLOCK_BYTES)
            raw = source.array[block].tobytes()
            for row, output in zip(self._matrix, outputs, strict=True):
                _fold(row[column], raw, output.array[block])


class NumpyKernel:
    """Works wherever numpy does."""

    name = "numpy"

    def product(self, matrix: Bytes) -> NumpyProduct:
        """Multiplication by `matrix`, shape (rows, columns)."""
        return NumpyProduct(matrix)


def _fold(coefficient: int, data: bytes, output: Bytes) -> None:
    """output ^= coefficient * data, both of one length."""
    if coefficient == 0:
        return
    if coefficient != 1:
        data = data.translate(_TABLES[coefficient])
    output ^= np.frombuffer(data, dtype=np.uint8)
