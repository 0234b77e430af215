"""Distinct values are numpy's, which is the oracle here."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ckptd.layout.distinct import distinct, distinct_rows, numbered

COLUMN = arrays.arrays(np.int64, st.integers(0, 20), elements=st.integers(-3, 5))
ROWS = arrays.arrays(np.int64, st.tuples(st.integers(0, 12), st.integers(1, 3)), elements=st.integers(-2, 2))


@settings(deadline=None, max_examples=100)
@given(COLUMN)
def test_values(values: np.ndarray) -> None:
    expected, first, number = np.unique(values, return_index=True, return_inverse=True)
    assert np.array_equal(distinct(values), expected)
    for found, wanted in zip(numbered(values), (expected, first, number), strict=True):
        assert np.array_equal(found, wanted)


@settings(deadline=None, max_examples=100)
@given(ROWS)
def test_rows(rows: np.ndarray) -> None:
    expected, first, number = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    for found, wanted in zip(distinct_rows(rows), (expected, first, number.ravel()), strict=True):
        assert np.array_equal(found, wanted)
