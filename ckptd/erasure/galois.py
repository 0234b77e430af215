"""The field GF(256) of `reedsolo.RSCodec`: polynomial 0x11d, generator 2.

Addition is XOR.  Elements are bytes; matrices and byte columns are numpy arrays of
dtype uint8.  Everything here is small and exact: it defines the code and checks the
fast kernels, it does not compute the bulk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

POLYNOMIAL = 0x11D
GENERATOR = 2
# Elements other than zero: the order of the multiplicative group.
ORDER = 255


def _powers() -> tuple[Bytes, Bytes]:
    """`EXP` (510 entries, so that a sum of two logarithms needs no modulo) and `LOG` (256 entries)."""
    exp = np.zeros(2 * ORDER, dtype=np.uint8)
    log = np.zeros(256, dtype=np.uint8)
    element = 1
    for power in range(ORDER):
        exp[power] = exp[power + ORDER] = element
        log[element] = power
        element <<= 1
        if element > 0xFF:
            element ^= POLYNOMIAL
    assert element == 1, "2 must generate the whole group"
    return exp, log


def _products(exp: Bytes, log: Bytes) -> Bytes:
    """The multiplication table, shape (256, 256)."""
    logarithms = log.astype(np.intp)
    table: Bytes = exp[logarithms[:, None] + logarithms[None, :]]
    table[0, :] = 0
    table[:, 0] = 0
    return table


# EXP[i] = 2**i; LOG[EXP[i]] = i for 0 <= i < 255; LOG[0] has no meaning.
EXP, LOG = _powers()
# PRODUCT[a, b] = a * b.
PRODUCT = _products(EXP, LOG)
for _table in (EXP, LOG, PRODUCT):
    _table.setflags(write=False)


def multiply(a: int, b: int) -> int:
    """The product a * b of two bytes."""
    return int(PRODUCT[a, b])


def inverse(a: int) -> int:
    """The byte b with a * b = 1.

    Raises: ValueError: a is zero.
    """
    if a == 0:
        raise ValueError("zero has no inverse in GF(256)")
    return int(EXP[ORDER - int(LOG[a])])


def power(a: int, exponent: int) -> int:
    """a multiplied `exponent` times (exponent >= 0); anything to the 0 is 1."""
    if exponent == 0:
        return 1
    if a == 0:
        return 0
    return int(EXP[int(LOG[a]) * exponent % ORDER])


def dot(matrix: Bytes, columns: Bytes) -> Bytes:
    """The matrix product (r, k) x (k, length) -> (r, length); uint8 in and out."""
    result = np.zeros((matrix.shape[0], columns.shape[1]), dtype=np.uint8)
    for inner in range(matrix.shape[1]):
        result ^= PRODUCT[matrix[:, inner, None], columns[None, inner]]
    return result
