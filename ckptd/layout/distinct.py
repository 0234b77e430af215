"""Sorted distinct values; numpy's `unique` imports its masked arrays, which takes longer than a plan."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

S = TypeVar("S", bound=np.generic)


def distinct(values: NDArray[S]) -> NDArray[S]:
    """Returns the distinct values [n], ascending."""
    ordered = np.sort(values, axis=None)
    return ordered[_first(ordered)]


def numbered(values: NDArray[S]) -> tuple[NDArray[S], NDArray[np.intp], NDArray[np.intp]]:
    """Returns the distinct values [n], where each is first, and for every one of `values` [m] its number."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = _first(ordered)
    return ordered[first], order[first], _numbers(order, first)


def distinct_rows(rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp], NDArray[np.intp]]:
    """The same of the rows of a matrix [m, d], in lexicographic order; d is 1 or more."""
    order = np.lexsort(rows.T[::-1])
    ordered = rows[order]
    first = np.ones(len(rows), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return ordered[first], order[first], _numbers(order, first)


def _first(ordered: NDArray[Any]) -> NDArray[np.bool_]:
    first = np.ones(len(ordered), np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    return first


def _numbers(order: NDArray[np.intp], first: NDArray[np.bool_]) -> NDArray[np.intp]:
    number = np.empty(len(order), np.intp)
    number[order] = np.cumsum(first) - 1
    return number
