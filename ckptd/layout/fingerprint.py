"""Fingerprints of logical tensors that no layout changes: those of boxes add up to that of the tensor.

    F = sum over elements v at index i of bits(v) * w_0[i_0] * w_1[i_1] * ...   mod 2^64

with fixed, pseudo-random, odd 64-bit weights per dimension.  A change of one element always changes F;
another one, such as an exchange of elements or rows, goes unseen with a probability of about 2^-32 at
worst.  It finds mistakes and damage, not malice: the weights are public.

The bits of an element of up to 4 bytes are an unsigned number.  One of 8 or 16 bytes counts as 2 or 4
numbers of 4 bytes (the lowest first), in one more dimension at the end: times an odd weight, the topmost
bit of a 64-bit number is the same for every element, so that exchanged signs would go unseen.  Weights and
definition never change; the tests hold golden values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Kernel = Callable[[NDArray[np.generic], Words], Words]

_MASK = (1 << 64) - 1
_KEY = 0x636B707464_0001  # "ckptd", first version
_GOLDEN = 0x9E3779B97F4A7C15
_SEGMENT = 4096  # a dimension's weights are products of two tables, so that long dimensions need no long ones
_INNER = 8192  # elements: at most so many in a row of weights that is made of several dimensions
_CHUNK = 1 << 19  # elements: what a kernel gets at once, and what is copied of a box that is not contiguous
_ROWS = 8192  # at most so many of them, as the sums of rows of few elements shall stay in a core's cache


def fingerprint(
    values: NDArray[np.generic], offset: Sequence[int] | None = None, kernel: Kernel | None = None
) -> int:
    """The fingerprint of a box of a tensor, 0 .. 2^64 - 1; add those of boxes with `add`.

    Args:
        values: the box, of any dtype of 1, 2, 4, 8 or 16 bytes (a view of its bits, such as uint16 for
            bfloat16, is as good), in any memory order; its number of dimensions must be the tensor's.
        offset: where the box begins in the tensor; None: at its begin.
        kernel: another way of computing `row_sums`, such as one in torch.

    Raises:
        ValueError: the element's width is none of these, or the offset does not fit.
    """
    at = [0] * values.ndim if offset is None else list(offset)
    if len(at) != values.ndim or any(start < 0 for start in at):
        raise ValueError(f"offset {tuple(at)} of a box with {values.ndim} dimensions")
    if values.size == 0:
        return 0
    sums = row_sums if kernel is None else kernel
    return sum(scale * _split(bits, list(enumerate(at)), sums) for scale, bits in _bits(values)) & _MASK


def add(parts: Sequence[int]) -> int:
    """The fingerprint of what these disjoint boxes of one tensor make up."""
    return sum(parts) & _MASK


def row_sums(bits: NDArray[Any], weights: Words) -> Words:
    """[n]: `sum(bits * weights, axis=1)` mod 2^64, of unsigned `bits` [n, m] in any memory order."""
    if bits.shape[1] < 8:  # in rows of so few, einsum takes longer to widen them than this
        bits = bits.astype(np.uint64)
    # einsum widens the bits some thousand at a time, which are still in the core's nearest cache when used.
    sums: Words = np.einsum("ij,j->i", bits, weights)
    return sums


# --- weights ------------------------------------------------------------------------------------------------

_PARTS = 1 << 16  # the dimension of the parts of wide elements; no tensor has so many


def weights(dim: int, start: int, count: int) -> Words:
    """[count]: w_dim[start], w_dim[start + 1], ...; all odd."""
    index = np.arange(start, start + count)
    return (
        _high(dim, start // _SEGMENT, (start + count - 1) // _SEGMENT + 1)[
            index // _SEGMENT - start // _SEGMENT
        ]
        * _low(dim)[index % _SEGMENT]
    )


@lru_cache(maxsize=64)
def _low(dim: int) -> Words:
    return _odd(_mixed(_KEY + 2 * dim), 0, _SEGMENT)


def _high(dim: int, start: int, stop: int) -> Words:
    return _odd(_mixed(_KEY + 2 * dim + 1), start, stop)


def _odd(key: int, start: int, stop: int) -> Words:
    """SplitMix64 at positions start .. stop - 1 of the stream with this key, made odd."""
    z = (np.arange(start, stop, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def _mixed(key: int) -> int:
    z = (key + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


# --- the sum ------------------------------------------------------------------------------------------------


def _bits(values: NDArray[np.generic]) -> list[tuple[int, NDArray[np.generic]]]:
    """The elements as unsigned numbers of at most 4 bytes: (weight, view) of each part of an element."""
    width = values.dtype.itemsize
    if width not in (1, 2, 4, 8, 16) or values.dtype.hasobject:
        raise ValueError(f"elements of {values.dtype} have {width} bytes; 1, 2, 4, 8 or 16 are known")
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    if width <= 4:
        return [(1, values.view(f"u{width}"))]
    parts = np.ascontiguousarray(values).reshape((*values.shape, 1)).view(np.uint32)
    return [(int(weight), parts[..., i]) for i, weight in enumerate(weights(_PARTS, 0, width // 4))]


def _split(bits: NDArray[np.generic], dims: list[tuple[int, int]], kernel: Kernel) -> int:
    """Cuts a long last dimension at multiples of a segment, where its weights fall into a product of two."""
    if bits.ndim == 0:
        return int(bits)
    dim, start = dims[-1]
    length = bits.shape[-1]
    head = min(-start % _SEGMENT, length)
    middle = (length - head) // _SEGMENT * _SEGMENT
    if middle <= _SEGMENT or bits.size // length >= 64:
        return _sum(bits, [weights(d, at, n) for (d, at), n in zip(dims, bits.shape, strict=True)], kernel)
    outer = [weights(d, at, n) for (d, at), n in zip(dims[:-1], bits.shape[:-1], strict=True)]
    total = 0
    for low, high in ((0, head), (head + middle, length)):
        if low < high:
            total += _sum(bits[..., low:high], [*outer, weights(dim, start + low, high - low)], kernel)
    first = (start + head) // _SEGMENT
    rows = bits[..., head : head + middle].reshape(*bits.shape[:-1], middle // _SEGMENT, _SEGMENT)
    total += _sum(rows, [*outer, _high(dim, first, first + middle // _SEGMENT), _low(dim)], kernel)
    return total & _MASK


def _sum(bits: NDArray[np.generic], factors: list[Words], kernel: Kernel) -> int:
    """The weighted sum, some rows at a time."""
    inner = factors[-1]
    dims = len(factors) - 1
    while dims > 0 and inner.size * factors[dims - 1].size <= _INNER:
        dims -= 1
        inner = np.multiply.outer(factors[dims], inner).ravel()
    if dims == 0:
        return int(kernel(bits.reshape(1, -1), inner)[0])
    rows = factors[dims - 1]
    total = 0
    step = max(1, min(_CHUNK // inner.size, _ROWS))
    for outer in np.ndindex(*bits.shape[: dims - 1]):
        scale = prod((int(factors[d][i]) for d, i in enumerate(outer)), start=1)
        block = bits[outer]
        part = 0
        for row in range(0, len(block), step):
            sums = kernel(block[row : row + step].reshape(-1, inner.size), inner)
            part += int(np.sum(sums * rows[row : row + step]))
        total += scale * part
    return total & _MASK
