"""The matrices of the code: what parity is made of, and how lost symbols come back.

The code is the systematic Reed-Solomon code of `reedsolo.RSCodec(m)` (fcr 0,
generator 2): parity is the remainder of data(x) * x**m divided by the generator
polynomial.  A remainder is linear in the data, so it is a matrix.  Symbols are
numbered 0..k-1 for data and k..k+m-1 for parity, in reedsolo's order of bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import numpy as np

from ckptd.erasure import galois
from ckptd.erasure.galois import Bytes
from ckptd.errors import NotEnoughCells

# A codeword cannot be longer than the field has elements other than zero.
MAX_SYMBOLS = galois.ORDER


def generator_polynomial(m: int) -> Bytes:
    """The product of (x - 2**i) for i = 0..m-1: m + 1 coefficients, the highest (always 1) first."""
    polynomial = np.ones(1, dtype=np.uint8)
    for i in range(m):
        root = galois.power(galois.GENERATOR, i)
        longer = np.zeros(len(polynomial) + 1, dtype=np.uint8)
        longer[:-1] = polynomial
        longer[1:] ^= galois.PRODUCT[root, polynomial]
        polynomial = longer
    return polynomial


def parity_rows(k: int, m: int) -> Bytes:
    """The matrix R, shape (m, k), with parity = R x data.

    Column i is the remainder of x**(m + k - 1 - i), because reedsolo's first byte
    has the highest power.

    Raises: ValueError: not (k >= 1 and m >= 1 and k + m <= 255).
    """
    if k < 1 or m < 1 or k + m > MAX_SYMBOLS:
        raise ValueError(
            f"a code needs k >= 1 data and m >= 1 parity symbols, at most {MAX_SYMBOLS} together; "
            f"found k = {k} and m = {m}"
        )
    divisor = generator_polynomial(m)[1:]
    rows = np.zeros((m, k), dtype=np.uint8)
    remainder = divisor.copy()
    rows[:, k - 1] = remainder
    for column in range(k - 2, -1, -1):
        leading = remainder[0]
        remainder = np.append(remainder[1:], np.uint8(0)) ^ galois.PRODUCT[leading, divisor]
        rows[:, column] = remainder
    return rows


@functools.lru_cache(maxsize=64)
def generator_matrix(k: int, m: int) -> Bytes:
    """All symbols from the data, shape (k + m, k): the identity above `parity_rows`.  Read-only.

    Raises: ValueError: as `parity_rows`.
    """
    generator = np.vstack([np.eye(k, dtype=np.uint8), parity_rows(k, m)])
    generator.setflags(write=False)
    return generator


def invert(matrix: Bytes) -> Bytes:
    """The inverse of a square matrix, by Gauss-Jordan elimination.

    Raises: ValueError: the matrix is not square or has no inverse.
    """
    size = matrix.shape[0]
    if matrix.shape != (size, size):
        raise ValueError(f"only a square matrix has an inverse; found shape {matrix.shape}")
    work = np.hstack([matrix, np.eye(size, dtype=np.uint8)])
    for column in range(size):
        pivot = column + int(np.argmax(work[column:, column] != 0))
        if work[pivot, column] == 0:
            raise ValueError(f"the matrix is singular: no pivot for column {column} of {size}")
        if pivot != column:
            work[[column, pivot]] = work[[pivot, column]]
        scale = galois.inverse(int(work[column, column]))
        work[column] = galois.PRODUCT[scale, work[column]]
        factors = work[:, column].copy()
        factors[column] = 0
        work ^= galois.PRODUCT[factors[:, None], work[column]]
    return work[:, size:].copy()


def choose(k: int, m: int, present: Collection[int]) -> tuple[int, ...]:
    """The k symbols that a decode reads, ascending: the lowest of those present.

    Raises:
        ValueError: a symbol outside 0..k+m-1, or one named twice.
        NotEnoughCells: fewer than k symbols are present.
    """
    check_symbols(k, m, present)
    if len(present) < k:
        raise NotEnoughCells(
            f"the stripe cannot be decoded: {k} symbols needed, {len(present)} found",
            why=f"the code has {k} data and {m} parity symbols and covers the loss of {m}, "
            f"but {k + m - len(present)} are missing",
            next="resume from an older snapshot or from storage",
        )
    return tuple(sorted(present)[:k])


def decode_matrix(k: int, m: int, present: Collection[int], missing: Collection[int]) -> Bytes:
    """The matrix, shape (len(missing), k), that gives the missing symbols, in the order given,
    from the symbols `choose(k, m, present)`.

    Raises:
        ValueError: a symbol outside 0..k+m-1, named twice, or both present and missing.
        NotEnoughCells: fewer than k symbols are present.
    """
    used = choose(k, m, present)
    check_symbols(k, m, missing)
    both = set(present) & set(missing)
    if both:
        raise ValueError(f"symbols {sorted(both)} are named both present and missing")
    return galois.dot(generator_matrix(k, m)[list(missing)], _to_data(k, m, used))


def _to_data(k: int, m: int, used: tuple[int, ...]) -> Bytes:
    """The matrix, shape (k, k), that gives all data from k symbols, ascending."""
    generator = generator_matrix(k, m)
    kept = [symbol for symbol in used if symbol < k]
    checks = [symbol for symbol in used if symbol >= k]
    lost = sorted(set(range(k)) - set(kept))
    # checks = A lost + B kept, so lost = A^-1 (checks + B kept): minus is plus here.  Only A
    # needs inverting, and it is never singular, since the code is MDS.
    inverted = invert(generator[np.ix_(checks, lost)])
    result = np.zeros((k, k), dtype=np.uint8)
    result[kept, range(len(kept))] = 1
    result[lost, : len(kept)] = galois.dot(inverted, generator[np.ix_(checks, kept)])
    result[lost, len(kept) :] = inverted
    return result


def check_symbols(k: int, m: int, symbols: Collection[int]) -> None:
    """Refuses symbol numbers that the code does not have.

    Raises: ValueError: a symbol outside 0..k+m-1, or one named twice.
    """
    outside = sorted(symbol for symbol in symbols if not 0 <= symbol < k + m)
    if outside:
        raise ValueError(f"symbols {outside} do not exist: k = {k}, m = {m} has 0..{k + m - 1}")
    if len(set(symbols)) != len(symbols):
        raise ValueError(f"a symbol is named twice in {sorted(symbols)}")
