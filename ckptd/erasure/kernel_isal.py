"""The compute kernel on ISA-L, called through ctypes.

`ctypes.CDLL` releases the interpreter lock during every call, so several threads
compute at once.  ISA-L's tables are opaque: their form depends on the processor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from ckptd.erasure.buffers import Span
from ckptd.erasure.galois import Bytes

# Space that ISA-L wants for the tables of one coefficient, in any of their forms.
_TABLE_BYTES = 32

# ISA-L takes lengths as a C int.
SPAN_BYTES = 1 << 30


class IsalLibrary:
    """The three functions of the library at `path`, with their types.

    Raises: OSError: no library there.  AttributeError: it has not these functions.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        integer, pointer = ctypes.c_int, ctypes.c_void_p
        # (k, rows, matrix, tables)
        self.init_tables = library.ec_init_tables
        self.init_tables.argtypes = [integer, integer, pointer, pointer]
        self.init_tables.restype = None
        # (length, k, rows, tables, sources, outputs)
        self.encode_data = library.ec_encode_data
        self.encode_data.argtypes = [integer, integer, integer, pointer, pointer, pointer]
        self.encode_data.restype = None
        # (length, k, rows, column, tables, source, outputs)
        self.encode_data_update = library.ec_encode_data_update
        self.encode_data_update.argtypes = [integer, integer, integer, integer, pointer, pointer, pointer]
        self.encode_data_update.restype = None


class IsalProduct:
    """Multiplication by one fixed matrix; the tables are made once and then only read."""

    def __init__(self, library: IsalLibrary, matrix: Bytes, span_bytes: int) -> None:
        self._library = library
        self._rows, self._columns = matrix.shape
        self._span_bytes = span_bytes
        coefficients = Span.of(np.ascontiguousarray(matrix))
        self._tables = Span.of(np.zeros(_TABLE_BYTES * matrix.size, dtype=np.uint8))
        library.init_tables(self._columns, self._rows, coefficients.address, self._tables.address)

    def write(self, sources: Sequence[Span], outputs: Sequence[Span]) -> None:
        """outputs = matrix x sources."""
        assert len(sources) == self._columns and len(outputs) == self._rows
        for start, length in self._pieces(outputs[0]):
            self._library.encode_data(
                length, self._columns, self._rows, self._tables.address,
                _pointers(sources, start), _pointers(outputs, start),
            )  # fmt: skip

    def fold(self, column: int, source: Span, outputs: Sequence[Span]) -> None:
        """outputs ^= matrix[:, column] x source."""
        assert 0 <= column < self._columns and len(outputs) == self._rows
        for start, length in self._pieces(source):
            self._library.encode_data_update(
                length, self._columns, self._rows, column, self._tables.address,
                source.address + start, _pointers(outputs, start),
            )  # fmt: skip

    def _pieces(self, span: Span) -> list[tuple[int, int]]:
        """(start, length) of the pieces that one call each takes."""
        size = span.array.size
        return [(at, min(self._span_bytes, size - at)) for at in range(0, size, self._span_bytes)]


class IsalKernel:
    """ISA-L from the library at `path`.

    Raises: OSError: no library there.  AttributeError: it is not ISA-L's.
    """

    def __init__(self, path: str, span_bytes: int = SPAN_BYTES) -> None:
        self.name = f"ISA-L ({path})"
        self._library = IsalLibrary(path)
        self._span_bytes = span_bytes

    def product(self, matrix: Bytes) -> IsalProduct:
        """Multiplication by `matrix`, shape (rows, columns)."""
        return IsalProduct(self._library, matrix, self._span_bytes)


def _pointers(spans: Sequence[Span], start: int) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(spans))(*[span.address + start for span in spans])
