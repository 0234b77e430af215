"""A column of numbers as short JSON: boxes of a mesh come in regular series, and are written as such.

A column is a list of items.  An item is a number, or a *series* `[base, n1, step1, n2, step2, ...]`: the
numbers base + i1*step1 + i2*step2 + ..., i1 < n1 running fastest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MAX_NUMBER: Final = 1 << 52  # exact in every JSON reader, and far from the end of int64
_LEVELS: Final = 6
_Item = tuple[int, tuple[tuple[int, int], ...]]  # base, (count, step) from the fastest


def pack(column: NDArray[np.int64]) -> list[Any]:
    """Returns the column's JSON value; `unpack` gives the column back."""
    items: list[_Item] = [(int(base), ()) for base in column]
    for _ in range(_LEVELS):
        joined = _join(items)
        if len(joined) == len(items):
            break
        items = joined
    return [base if not loops else [base, *(x for loop in loops for x in loop)] for base, loops in items]


def unpack(value: object, length: int) -> NDArray[np.int64]:
    """Returns the column of exactly `length` numbers; allocates nothing that it does not return.

    Raises:
        ValueError: the value is no column of that length.
    """
    if not isinstance(value, list):
        raise ValueError(f"expected a list, found {type(value).__name__}")
    sizes = [_size(item) for item in value]
    if sum(sizes) != length:
        raise ValueError(f"it holds {sum(sizes)} numbers, expected {length}")
    column = np.empty(length, np.int64)
    at = 0
    for item, size in zip(value, sizes, strict=True):
        column[at : at + size] = item if isinstance(item, int) else _expand(item)
        at += size
    if length and (column.min() < 0 or column.max() > MAX_NUMBER):
        raise ValueError(f"its numbers run from {column.min()} to {column.max()}")
    return column


def _join(items: Sequence[_Item]) -> list[_Item]:
    """Joins neighbours of one form whose bases go up by one step; greedily, in one pass."""
    joined: list[_Item] = []
    at = 0
    while at < len(items):
        base, loops = items[at]
        end = at + 1
        if end < len(items) and items[end][1] == loops:
            step = items[end][0] - base
            while end < len(items) and items[end][1] == loops and items[end][0] - items[end - 1][0] == step:
                end += 1
            # Two alone may belong to the next series: three numbers or two series pay.
            if end - at > 2 or loops:
                joined.append((base, (*loops, (end - at, step))))
                at = end
                continue
        joined.append(items[at])
        at += 1
    return joined


def _size(item: object) -> int:
    if type(item) is int:
        if abs(item) > MAX_NUMBER:
            raise ValueError("a number is out of range")
        return 1
    if not isinstance(item, list) or len(item) % 2 == 0 or not 3 <= len(item) <= 1 + 2 * _LEVELS:
        raise ValueError("an item is neither a number nor a series")
    if any(type(x) is not int or abs(x) > MAX_NUMBER for x in item) or any(n < 1 for n in item[1::2]):
        raise ValueError("a series holds something that is no number in range")
    return math.prod(item[1::2])


def _expand(item: list[int]) -> NDArray[np.int64]:
    # Steps and counts are below 2**52, but their product may not be: floats tell without wrapping.
    reach = abs(float(item[0])) + sum(abs(float(s)) * n for n, s in zip(item[1::2], item[2::2], strict=True))
    if reach > MAX_NUMBER:
        raise ValueError("a series runs out of range")
    found = np.array([item[0]], np.int64)
    for count, step in zip(item[1::2], item[2::2], strict=True):
        found = (np.arange(count, dtype=np.int64)[:, None] * step + found[None, :]).reshape(-1)
    return found
