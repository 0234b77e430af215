"""`Code`: parity from data, and lost symbols from those that are left, over the caller's own buffers.

The bytes are those of stock reedsolo: byte i of all symbols together, data first,
is one codeword of `reedsolo.RSCodec(m)`.  Symbols are numbered 0..k-1 for data and
k..k+m-1 for parity.  The code works byte by byte, so any range of the buffers may
be done alone: pass slices of memoryviews.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ckptd.erasure import matrix
from ckptd.erasure.buffers import Buffer, spans
from ckptd.erasure.kernel import Kernel, Product, best_kernel

# Erasure patterns whose tables are kept; a table takes 32 * k * missing bytes.
_PATTERNS = 256


class Code:
    """The systematic Reed-Solomon code with k data and m parity symbols.

    A buffer is anything with the buffer protocol whose bytes are contiguous
    (memoryview, mmap, bytearray, numpy array; bytes where it is only read).  Nothing
    is copied or kept.  In one call all buffers have one length (0 is allowed), and a
    buffer that is written overlaps no other.  Calls are safe from several threads as
    long as no two write the same bytes.

    Args:
        k: data symbols, at least 1.
        m: parity symbols, at least 1; k + m is at most 255.
        kernel: what computes; the fastest that this machine has when None.

    Raises: ValueError: k or m out of range.
    """

    def __init__(self, k: int, m: int, kernel: Kernel | None = None) -> None:
        self.k = k
        self.m = m
        self.kernel = best_kernel() if kernel is None else kernel
        self._parity = _parity_product(self.kernel, k, m)

    def __repr__(self) -> str:
        return f"Code(k={self.k}, m={self.m}, kernel={self.kernel.name!r})"

    def encode(self, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
        """Writes the m parity buffers from the k data buffers; what they held before is lost.

        Raises: ValueError: wrong number of buffers, unequal lengths, a read-only
            parity buffer, or overlapping ones.
        """
        _check_count("data", len(data), self.k)
        _check_count("parity", len(parity), self.m)
        sources, outputs = spans(data, parity, _names(("data", self.k), ("parity", self.m)))
        if outputs[0].array.size:
            self._parity.write(sources, outputs)

    def update(self, index: int, chunk: Buffer, parity: Sequence[Buffer]) -> None:
        """Folds `chunk` as data symbol `index` into all m parity buffers (parity[p] ^= coefficient * chunk).

        From zeroed parity, k updates in any order give what `encode` gives.  With
        chunk = old ^ new, an update turns the parity of old data into that of new.

        Raises: ValueError: index not in 0..k-1, or buffers as for `encode`.
        """
        _check_index("data symbol", index, self.k)
        _check_count("parity", len(parity), self.m)
        sources, outputs = spans([chunk], parity, lambda: ["chunk", *_names(("parity", self.m))()])
        if outputs[0].array.size:
            self._parity.fold(index, sources[0], outputs)

    def update_one(self, index: int, parity_index: int, chunk: Buffer, parity: Buffer) -> None:
        """Folds `chunk` as data symbol `index` into the one parity buffer `parity_index` (0..m-1).

        For a node that holds a single parity symbol of the stripe; otherwise as `update`.

        Raises: ValueError: index not in 0..k-1, parity_index not in 0..m-1, or
            buffers as for `encode`.
        """
        _check_index("data symbol", index, self.k)
        _check_index("parity symbol", parity_index, self.m)
        sources, outputs = spans([chunk], [parity], lambda: ["chunk", f"parity[{parity_index}]"])
        if outputs[0].array.size:
            _row_product(self.kernel, self.k, self.m, parity_index).fold(index, sources[0], outputs)

    def begin_one(self, index: int, parity_index: int, chunk: Buffer, parity: Buffer) -> None:
        """Writes parity buffer `parity_index` as if all data but `chunk` as symbol `index` were zeros.

        What `update_one` makes of a zeroed buffer, without the zeroing and without reading it.

        Raises: ValueError: as `update_one`.
        """
        _check_index("data symbol", index, self.k)
        _check_index("parity symbol", parity_index, self.m)
        sources, outputs = spans([chunk], [parity], lambda: ["chunk", f"parity[{parity_index}]"])
        if outputs[0].array.size:
            scalar = _scalar_product(self.kernel, self.k, self.m, parity_index, index)
            if scalar is None:
                np.copyto(outputs[0].array, sources[0].array)  # lets go of the interpreter lock
            else:
                scalar.write(sources, outputs)

    def is_one(self, index: int, parity_index: int) -> bool:
        """Whether the code's coefficient is 1 there: alone, the symbol's bytes are the parity's."""
        return _scalar_product(self.kernel, self.k, self.m, parity_index, index) is None

    def decode(self, present: Mapping[int, Buffer], missing: Mapping[int, Buffer]) -> None:
        """Writes the missing symbols, data or parity, from any k of the present ones.

        Of more than k present symbols the k lowest are read.  Nothing is verified:
        a wrong symbol given as present gives wrong bytes.

        Raises:
            ValueError: a symbol not in 0..k+m-1 or both present and missing; buffers
                as for `encode`.
            NotEnoughCells: fewer than k symbols are present.
        """
        if not missing:
            matrix.check_symbols(self.k, self.m, present)
            return
        lost = tuple(sorted(missing))
        used, product = _decoder(self.kernel, self.k, self.m, tuple(sorted(present)), lost)
        sources, outputs = spans(
            [present[symbol] for symbol in used],
            [missing[symbol] for symbol in lost],
            lambda: [f"symbol {symbol}" for symbol in (*used, *lost)],
        )
        if outputs[0].array.size:
            product.write(sources, outputs)


@functools.lru_cache(maxsize=_PATTERNS)
def _parity_product(kernel: Kernel, k: int, m: int) -> Product:
    return kernel.product(matrix.parity_rows(k, m))


@functools.lru_cache(maxsize=_PATTERNS)
def _row_product(kernel: Kernel, k: int, m: int, row: int) -> Product:
    return kernel.product(matrix.parity_rows(k, m)[row : row + 1])


@functools.lru_cache(maxsize=_PATTERNS)
def _scalar_product(kernel: Kernel, k: int, m: int, row: int, column: int) -> Product | None:
    """Multiplication by one coefficient of the code; None where that is 1."""
    coefficient = matrix.parity_rows(k, m)[row : row + 1, column : column + 1]
    return None if coefficient[0, 0] == 1 else kernel.product(coefficient)


@functools.lru_cache(maxsize=_PATTERNS)
def _decoder(
    kernel: Kernel, k: int, m: int, present: tuple[int, ...], missing: tuple[int, ...]
) -> tuple[tuple[int, ...], Product]:
    """The symbols to read, and the product that makes the missing ones of them."""
    decoding = matrix.decode_matrix(k, m, present, missing)
    return matrix.choose(k, m, present), kernel.product(decoding)


def _names(*named: tuple[str, int]) -> Callable[[], list[str]]:
    """The names of counted buffers, written out only when an error needs them."""
    return lambda: [f"{name}[{i}]" for name, count in named for i in range(count)]


def _check_count(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{expected} {name} buffers needed, {found} given")


def _check_index(name: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ValueError(f"{name} {index} does not exist: the code has 0..{count - 1}")
