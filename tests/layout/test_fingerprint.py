"""Fingerprints: the definition, additivity over any partition, what they notice, and values for all time."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.layout import boxes, fingerprint
from ckptd.layout.fingerprint import add
from ckptd.layout.fingerprint import fingerprint as of

MASK = (1 << 64) - 1


def slow(values: np.ndarray) -> int:
    """The definition, one element at a time, in Python's integers."""
    total = 0
    width = values.itemsize
    for index in np.ndindex(*values.shape):
        bits = int.from_bytes(values[index].tobytes(), "little")
        weight = 1
        for dim, i in enumerate(index):
            weight = weight * int(fingerprint.weights(dim, i, 1)[0]) & MASK
        if width <= 4:
            total += bits * weight
        else:
            for part in range(width // 4):
                number = bits >> (32 * part) & 0xFFFFFFFF
                total += number * weight * int(fingerprint.weights(1 << 16, part, 1)[0])
    return total & MASK


def filled(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.random.default_rng(seed).integers(0, 256, count * np.dtype(dtype).itemsize, np.uint8)
    return raw.view(dtype).reshape(shape)


DTYPES = ["u1", "i1", "f2", "u2", "f4", "i4", "f8", "i8", "c8", "c16"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_the_definition_for_every_width(dtype: str) -> None:
    for shape in [(), (1,), (5,), (0, 4), (3, 4), (2, 1, 3), (2, 2, 2, 3), (2, 1, 2, 1, 2)]:
        values = filled(shape, dtype, 1)
        assert of(values) == slow(values)
    assert of(np.asfortranarray(filled((3, 4), dtype, 2))) == slow(filled((3, 4), dtype, 2))
    assert of(filled((6, 8), dtype, 3)[::2, 1::3]) == slow(filled((6, 8), dtype, 3)[::2, 1::3])
    swapped = filled((3, 4), dtype, 4)
    assert of(swapped.astype(swapped.dtype.newbyteorder(">"))) == of(swapped)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 6), max_size=4), st.sampled_from(DTYPES), st.data())
def test_the_fingerprints_of_any_partition_add_up(shape: list[int], dtype: str, data: st.DataObject) -> None:
    values = filled(tuple(shape), dtype, data.draw(st.integers(0, 1000)))
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))}) for n in shape]
    parts = []
    for box in itertools.product(*(list(itertools.pairwise(c)) for c in cuts)):
        part = values[tuple(slice(a, b) for a, b in box)]
        parts.append(of(part.copy(), [a for a, _ in box]))
    assert add(parts) == of(values)


def pieces(
    total: int, shape: tuple[int, ...], count: int, seed: int
) -> Iterator[tuple[list[int], list[int]]]:
    cuts = np.sort(np.random.default_rng(seed).integers(0, total + 1, count - 1))
    for low, high in itertools.pairwise([0, *cuts.tolist(), total]):
        for offset, size in zip(*boxes.of_range(shape, low, high), strict=True):
            yield offset.tolist(), size.tolist()


@pytest.mark.parametrize(
    "shape", [(50_000,), (3, 20_011), (2, 3, 12_289), (20_011, 3), (70, 5_000), (9_000, 2, 2)]
)
def test_long_dimensions_are_cut_at_segments_and_still_add_up(shape: tuple[int, ...]) -> None:
    values = filled(shape, "u2", 5)
    weight = np.ones((), np.uint64)
    for dim, n in enumerate(shape):
        weight = np.multiply.outer(weight, fingerprint.weights(dim, 0, n))
    whole = int(np.sum(values.astype(np.uint64) * weight))
    assert of(values) == whole
    parts = [
        of(values[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))], offset)
        for offset, size in pieces(values.size, shape, 7, 6)
    ]
    assert add(parts) == whole


def by_rows(bits: np.ndarray, weights: np.ndarray) -> list[int]:
    """`row_sums` in Python's integers."""
    factors = weights.tolist()
    return [sum(map(operator.mul, row, factors)) & MASK for row in bits.tolist()]


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
def test_sums_of_rows_of_every_length_are_exact(dtype: str) -> None:
    """Contiguous, strided and transposed ones; the largest weight, so that sums go over 2^64 in every row."""
    for length in range(1, 301):
        weights = fingerprint.weights(1, 0, length)
        weights[-1] = MASK
        wide = filled((6, 2 * length), dtype, length)
        wide[2] = np.iinfo(dtype).max
        tall = np.asfortranarray(wide[:, :length])
        for bits in (wide[:, :length], wide[::2, ::2], wide[:, :length][:, ::-1], tall):
            assert fingerprint.row_sums(bits, weights).tolist() == by_rows(bits, weights), length


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
def test_every_bit_of_an_element_has_its_place(dtype: str) -> None:
    """All bytes at every place of an element, in rows shorter and longer than einsum's buffer (8,192)."""
    values = np.repeat(np.arange(256, dtype="u1"), 40).repeat(np.dtype(dtype).itemsize).view(dtype)
    values = np.ascontiguousarray(values.reshape(-1, 40).T)
    for box in (values, values.T, values.reshape(1, -1), values[::3, ::-5]):
        assert of(box) == by_rows(box.reshape(1, -1), of_all(box.shape))[0]


def of_all(shape: tuple[int, ...]) -> np.ndarray:
    """The weights of all elements, row-major."""
    product = np.ones(1, np.uint64)
    for dim, n in enumerate(shape):
        product = np.multiply.outer(product, fingerprint.weights(dim, 0, n)).ravel()
    return product


@pytest.mark.parametrize("shape", [(8193, 2), (8200, 9), (17, 70_001), (70, 9_001)])
def test_more_rows_than_are_summed_up_at_once(shape: tuple[int, ...]) -> None:
    values = filled(shape, "u1", 9)
    assert of(values) == by_rows(values.reshape(1, -1), of_all(shape))[0]
    assert of(np.asfortranarray(values)) == of(values)


def test_a_change_of_one_element_or_place_is_noticed() -> None:
    for dtype in DTYPES:
        values = filled((6, 8), dtype, 7)
        before = of(values)
        seen = {before, of(values.T.copy()), of(values[::-1]), of(values[:, ::-1]), of(values, (1, 0))}
        assert len(seen) == 5
        for bit in range(values.itemsize * 8):
            changed = values.copy()
            changed.view(np.uint8).reshape(6, -1)[3, 2 * values.itemsize + bit // 8] ^= 1 << bit % 8
            assert of(changed) != before
        rows = values.copy()
        rows[[1, 4]] = rows[[4, 1]]
        assert of(rows) != before


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_exchanged_signs_are_noticed(dtype: str) -> None:
    """With one 64-bit number per element, the signs of two float64 would have the same weight, 2^63."""
    values = np.array([1.5, -1.5, 2.0, 4.0], dtype)
    assert of(values) != of(values[[1, 0, 2, 3]])
    assert of(values) != of(-values)


def test_the_weights_are_odd_and_differ() -> None:
    every = [fingerprint.weights(dim, 0, 20_000) for dim in (0, 1, 2, 1 << 16)]
    assert all((w % np.uint64(2) == 1).all() for w in every)
    assert len(np.unique(np.concatenate(every))) == 80_000
    assert np.array_equal(every[1][4000:9000], fingerprint.weights(1, 4000, 5000))
    ones = np.concatenate(every).view(np.uint8)
    assert abs(np.unpackbits(ones).mean() - (0.5 + 0.5 / 64)) < 0.001


def test_values_are_the_same_for_all_time() -> None:
    """Recorded fingerprints are compared with new ones for years: these numbers must never change."""
    assert [hex(int(x)) for x in fingerprint.weights(0, 0, 3)] == GOLDEN_WEIGHTS[0]
    assert [hex(int(x)) for x in fingerprint.weights(2, 4095, 3)] == GOLDEN_WEIGHTS[1]
    found = {
        "float32": of(np.arange(24, dtype="<f4").reshape(2, 3, 4)),
        "bfloat16": of((np.arange(24, dtype="<f4").view("<u4") >> 16).astype("<u2").reshape(4, 6)),
        "float64": of(np.arange(5, dtype="<f8")),
        "int64": of(np.arange(-3, 3, dtype="<i8").reshape(2, 3)),
        "bool": of(np.array([True, False, True])),
        "scalar": of(np.array(7, "<u4")),
        "long": of((np.arange(10_000) % 251).astype("u1")),
    }
    assert {name: hex(value) for name, value in found.items()} == GOLDEN


GOLDEN_WEIGHTS = [
    ["0x8938947499105f33", "0x6f9dc07decad1b3d", "0x2e2e4d76ffe16c8f"],
    ["0xc50693c026ce8fe5", "0xbf9561edf1fb7095", "0xf101ffd30d8755d7"],
]
GOLDEN = {
    "float32": "0x7291335805200000",
    "bfloat16": "0xfc46a160e24819d0",
    "float64": "0x4f8a81e603c80000",
    "int64": "0x1bc9b5a6f74b6e6",
    "bool": "0xb766e1eb98f1cbc2",
    "scalar": "0x7",
    "long": "0x7ca85f175def045a",
}


def test_another_kernel_may_do_the_sums() -> None:
    def multiply_then_add(bits: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint64) * weights).sum(axis=1)

    values = filled((130, 700), "f4", 8)
    assert of(values, kernel=multiply_then_add) == of(values)


def test_unknown_widths_and_offsets_are_refused() -> None:
    with pytest.raises(ValueError, match="12 bytes"):
        of(np.zeros(3, "V12"))
    with pytest.raises(ValueError, match="8 bytes"):
        of(np.array([object()]))
    with pytest.raises(ValueError, match="offset"):
        of(np.zeros((3, 3)), (1,))
    with pytest.raises(ValueError, match="offset"):
        of(np.zeros(3), (-1,))
