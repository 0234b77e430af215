"""Boxes against plain enumeration of indices."""

from __future__ import annotations

import itertools
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.layout import boxes


def indices(offset: np.ndarray, size: np.ndarray) -> list[tuple[int, ...]]:
    """The indices in a box, row-major."""
    return list(itertools.product(*(range(a, a + n) for a, n in zip(offset, size, strict=True))))


def test_strides_of_a_contiguous_array() -> None:
    for shape in [(), (5,), (2, 3), (4, 1, 3, 2)]:
        array = np.zeros(shape, np.int8)
        assert boxes.row_major(shape) == (array.strides if array.size > 1 else boxes.row_major(shape))
    assert boxes.row_major((2, 3, 4)) == (12, 4, 1)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_a_flat_range_is_a_few_boxes_in_order(shape: list[int], data: st.DataObject) -> None:
    total = prod(shape)
    low = data.draw(st.integers(0, total))
    high = data.draw(st.integers(low, total))
    offsets, sizes = boxes.of_range(shape, low, high)
    assert len(offsets) <= max(1, 2 * len(shape) - 1)
    assert (sizes > 0).all()
    every = [index for box in zip(offsets, sizes, strict=True) for index in indices(*box)]
    assert every == list(itertools.product(*map(range, shape)))[low:high]


def test_flat_ranges_at_once_are_the_ranges_one_by_one() -> None:
    shape, cuts = (3, 4, 5), np.array([0, 1, 7, 19, 20, 33, 33, 58, 60])
    which, offsets, sizes = boxes.of_ranges(shape, cuts[:-1], cuts[1:])
    for i, (low, high) in enumerate(itertools.pairwise(cuts.tolist())):
        alone = boxes.of_range(shape, low, high)
        assert np.array_equal(offsets[which == i], alone[0])
        assert np.array_equal(sizes[which == i], alone[1])


@pytest.mark.parametrize(("low", "high"), [(-1, 2), (3, 2), (0, 7)])
def test_a_flat_range_outside_the_tensor_is_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="not within the 6 elements"):
        boxes.of_range((2, 3), low, high)


def drawn_boxes(data: st.DataObject, dims: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    count = data.draw(st.integers(0, most))
    rows = st.lists(st.integers(0, 6), min_size=dims, max_size=dims)
    low = np.array([data.draw(rows) for _ in range(count)], np.int64).reshape(count, dims)
    size = np.array([data.draw(rows) for _ in range(count)], np.int64).reshape(count, dims)
    return low, size


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_pairs_finds_all_that_overlap_and_no_others(data: st.DataObject) -> None:
    dims = data.draw(st.integers(0, 3))
    (low, size), (other_low, other_size) = (drawn_boxes(data, dims, 8) for _ in range(2))
    size, other_size = size + 1, other_size + 1
    i, j = boxes.pairs(low, low + size, other_low, other_low + other_size)
    expected = {
        (a, b)
        for a in range(len(low))
        for b in range(len(other_low))
        if set(indices(low[a], size[a])) & set(indices(other_low[b], other_size[b]))
    }
    assert len(i) == len(expected)
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == expected
    common_low, common = boxes.intersect(low[i], size[i], other_low[j], other_size[j])
    for k in range(len(i)):
        assert set(indices(common_low[k], common[k])) == set(indices(low[i[k]], size[i[k]])) & set(
            indices(other_low[j[k]], other_size[j[k]])
        )


def test_pairs_of_grids_are_found_at_the_cost_of_the_result() -> None:
    def grid(rows: int, columns: int) -> np.ndarray:
        return np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)

    first, second = grid(96, 90) * [128, 1], grid(128, 90) * [96, 1]
    i, j = boxes.pairs(first, first + np.array([128, 1]), second, second + np.array([96, 1]))
    assert len(i) == (96 + 128 - 32) * 90
    assert len(np.unique(i * len(second) + j)) == len(i)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_subtract_leaves_exactly_the_rest(data: st.DataObject) -> None:
    dims = data.draw(st.integers(0, 3))
    numbers = st.lists(st.integers(0, 5), min_size=dims, max_size=dims)
    offset, size, hole, extent = (data.draw(numbers) for _ in range(4))
    left = boxes.subtract(offset, size, hole, extent)
    every = [index for a, n in left for index in indices(np.array(a), np.array(n))]
    assert len(every) == len(set(every))
    assert set(every) == set(indices(np.array(offset), np.array(size))) - set(
        indices(np.array(hole), np.array(extent))
    )


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_fault_is_found_if_and_only_if_there_is_one(data: st.DataObject) -> None:
    """Tilings from random cuts, then perhaps one box changed; compared with counting every element."""
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    offsets, sizes = [], []
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    for box in itertools.product(*(list(itertools.pairwise(c)) for c in cuts)):
        offsets.append([a for a, _ in box])
        sizes.append([b - a for a, b in box])
    low = np.array(offsets, np.int64).reshape(len(offsets), len(shape))
    size = np.array(sizes, np.int64).reshape(len(offsets), len(shape))
    if data.draw(st.booleans()) and len(low):
        at = data.draw(st.integers(0, len(low) - 1))
        change = data.draw(st.sampled_from(["drop", "twice", "move", "grow"]))
        if change == "drop":
            low, size = np.delete(low, at, 0), np.delete(size, at, 0)
        elif change == "twice":
            low, size = np.concatenate([low, low[at : at + 1]]), np.concatenate([size, size[at : at + 1]])
        elif shape:
            dim = data.draw(st.integers(0, len(shape) - 1))
            (low if change == "move" else size)[at, dim] += data.draw(st.sampled_from([-1, 1]))
            size = np.maximum(size, 0)
    count: dict[tuple[int, ...], int] = dict.fromkeys(itertools.product(*map(range, shape)), 0)
    for a, n in zip(low, size, strict=True):
        for index in indices(a, n):
            count[index] = count.get(index, 0) + 1
    inside = set(itertools.product(*map(range, shape)))
    wrong = sorted(index for index, times in count.items() if times != (index in inside))
    found = boxes.fault(shape, low, size)
    if not wrong:
        assert found is None
    else:
        assert found is not None
        assert found == boxes.Fault(0, wrong[0], count[wrong[0]])


def test_fault_sees_groups_apart_and_thousands_of_equal_boxes_cheaply() -> None:
    offsets, sizes = np.zeros((20000, 2), np.int64), np.full((20000, 2), 4)
    assert boxes.fault((4, 4), offsets, sizes, np.arange(20000)) is None
    found = boxes.fault((4, 4), offsets, sizes)
    assert found == boxes.Fault(0, (0, 0), 20000)
    sizes[777, 1] = 3
    assert boxes.fault((4, 4), offsets, sizes, np.arange(20000)) == boxes.Fault(777, (0, 3), 0)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-5, 20), st.integers(0, 6)), max_size=12))
def test_merge_is_the_union_and_joins_what_touches(intervals: list[tuple[int, int, int]]) -> None:
    key, low, length = (np.array([x[i] for x in intervals], np.int64) for i in range(3))
    merged = list(zip(*(x.tolist() for x in boxes.merge(key, low, low + length)), strict=True))
    assert {(k, x) for k, a, b in merged for x in range(a, b)} == {
        (k, x) for k, a, n in intervals for x in range(a, a + n)
    }
    assert merged == sorted(merged)
    assert all(k != m or b < c for (k, _, b), (m, c, _) in itertools.pairwise(merged))
