"""Which kernel computes the bytes of the code: ISA-L where it loads and proves itself, else numpy.

A kernel multiplies byte columns by a fixed matrix over GF(256).  It gets spans of one
length (at least 1), and outputs that overlap nothing.  Everything that a user can get
wrong is checked before, in `ckptd.erasure.buffers`.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ckptd.erasure import galois
from ckptd.erasure.buffers import Span
from ckptd.erasure.galois import Bytes
from ckptd.erasure.kernel_isal import IsalKernel
from ckptd.erasure.kernel_numpy import NumpyKernel

log = logging.getLogger(__name__)

# The name under which a system's own ISA-L is found by the loader.
SYSTEM_LIBRARY = "libisal.so.2"

# (rows, columns) and lengths of the self-test: ISA-L has code of its own for one to six
# rows, and for what is left beyond whole 16, 32 and 64 byte vectors.
_TEST_SHAPES = ((1, 1), (1, 5), (2, 4), (3, 3), (4, 4), (5, 2), (6, 3), (7, 10))
_TEST_LENGTHS = (1, 15, 31, 33, 63, 64, 65, 129, 300)
_GUARD_BYTES = 64


class Product(Protocol):
    """Multiplication by one fixed matrix of shape (rows, columns); safe for concurrent calls."""

    def write(self, sources: Sequence[Span], outputs: Sequence[Span]) -> None:
        """outputs = matrix x sources; `columns` sources, `rows` outputs."""
        ...

    def fold(self, column: int, source: Span, outputs: Sequence[Span]) -> None:
        """outputs ^= matrix[:, column] x source; `rows` outputs."""
        ...


class Kernel(Protocol):
    """A way to compute products; `name` is for the log and for `doctor`."""

    @property
    def name(self) -> str: ...

    def __hash__(self) -> int:
        """Kernels are compared by identity: they are keys of the caches of products."""
        ...

    def product(self, matrix: Bytes) -> Product:
        """Multiplication by `matrix`, uint8 of shape (rows, columns); its tables are made here, once."""
        ...


@functools.cache
def best_kernel() -> Kernel:
    """The fastest kernel that works on this machine; chosen, tested and logged once per process."""
    return select(library_paths())


def library_paths() -> Iterator[str]:
    """Where ISA-L may be, best first: the library in the pyeclib wheel, then the system's.

    pyeclib itself is not imported: only the library beside it is wanted.
    """
    spec = importlib.util.find_spec("pyeclib")
    if spec is not None and spec.origin is not None:
        beside = Path(spec.origin).parent.parent / "pyeclib.libs"
        yield from sorted(str(path) for path in beside.glob("libisal*.so*"))
    yield SYSTEM_LIBRARY


def select(paths: Iterator[str] | Sequence[str]) -> Kernel:
    """ISA-L from the first of `paths` that loads and computes correctly, else the numpy kernel."""
    refusals: list[str] = []
    for path in paths:
        try:
            kernel = IsalKernel(path)
        except (OSError, AttributeError) as error:
            refusals.append(f"{path}: {error}")
            continue
        fault = find_fault(kernel)
        if fault is None:
            log.info("erasure code: computed by %s", kernel.name)
            return kernel
        refusals.append(f"{path}: {fault}")
        log.error("erasure code: %s computes wrong bytes and is not used: %s", kernel.name, fault)
    log.warning(
        "erasure code: computed by numpy, about twenty times slower, because ISA-L did not load (%s). "
        "Next: install pyeclib>=1.6.2 or the system's libisal2",
        "; ".join(refusals),
    )
    return NumpyKernel()


def find_fault(kernel: Kernel) -> str | None:
    """What the kernel computes wrongly, compared with the field's own arithmetic; None when nothing."""
    for (rows, columns), length in itertools.product(_TEST_SHAPES, _TEST_LENGTHS):
        # 131 is odd, so every byte value occurs; the offset makes the coefficients differ per shape.
        matrix = _pattern(rows * columns, 131, rows * 7 + columns).reshape(rows, columns)
        sources = _pattern(columns * length, 167, length).reshape(columns, length)
        product = kernel.product(matrix)
        right = galois.dot(matrix, sources)

        written = _Guarded(rows, length)
        product.write([Span.of(source) for source in sources], written.spans())
        folded = _Guarded(rows, length)
        for column in range(columns):
            product.fold(column, Span.of(sources[column]), folded.spans())

        for what, got in (("write", written), ("fold", folded)):
            case = f"{what} of a {rows} x {columns} matrix on {length} bytes"
            if not all(np.array_equal(a, b) for a, b in zip(got.rows, right, strict=True)):
                return f"{case} gave wrong bytes"
            if not got.intact():
                return f"{case} wrote outside of its buffers"
    return None


class _Guarded:
    """Output rows, zeroed, with guard bytes around each of them."""

    def __init__(self, count: int, length: int) -> None:
        self._all = np.full((count, length + 2 * _GUARD_BYTES), 0xA5, dtype=np.uint8)
        # One past the guard, so that the rows are not aligned to anything.
        self._span = slice(_GUARD_BYTES + 1, _GUARD_BYTES + 1 + length)
        self._all[:, self._span] = 0
        self.rows: list[Bytes] = [row[self._span] for row in self._all]

    def spans(self) -> list[Span]:
        return [Span.of(row) for row in self.rows]

    def intact(self) -> bool:
        """Whether all guard bytes are as they were."""
        guards = np.delete(self._all, self._span, axis=1)
        return bool(np.all(guards == 0xA5))


def _pattern(count: int, factor: int, offset: int) -> Bytes:
    return (np.arange(count) * factor + offset).astype(np.uint8)
