"""Digests: one per 64 KiB cell, zeros behind the end, exact about which cell differs."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.image import CELL_BYTES, DIGEST_BYTES, cell_digests, cells_of, mismatches

LENGTHS = [0, 1, CELL_BYTES - 1, CELL_BYTES, CELL_BYTES + 1, 3 * CELL_BYTES, 3 * CELL_BYTES + 17]


def content(nbytes: int, seed: int = 1) -> bytearray:
    return bytearray(random.Random(seed).randbytes(nbytes))


@pytest.mark.parametrize("nbytes", LENGTHS)
def test_digests_are_those_of_the_padded_cells(nbytes: int) -> None:
    data = content(nbytes)
    padded = bytes(data).ljust(cells_of(nbytes) * CELL_BYTES, b"\0")
    expected = [
        xxhash.xxh3_128(padded[i : i + CELL_BYTES]).digest() for i in range(0, len(padded), CELL_BYTES)
    ]
    assert cell_digests(data) == b"".join(expected)
    assert cell_digests(padded) == cell_digests(data)
    assert len(expected) == cells_of(nbytes) == -(-nbytes // CELL_BYTES)


def test_a_known_digest() -> None:
    # As libxxhash 0.8.1 computes it: digests must mean the same on all nodes, whatever is installed there.
    assert cell_digests(bytes(CELL_BYTES)).hex() == "fd5ee061c8433a0f33b202d302b65caa"
    assert cell_digests(b"\0") == cell_digests(bytes(CELL_BYTES))
    assert len(cell_digests(b"\0")) == DIGEST_BYTES


@settings(deadline=None, derandomize=True, max_examples=25)
@given(nbytes=st.integers(1, 4 * CELL_BYTES), data=st.data())
def test_mismatches_names_exactly_the_changed_cells(nbytes: int, data: st.DataObject) -> None:
    image = content(nbytes, nbytes)
    digests = cell_digests(image)
    assert mismatches(image, digests) == []
    flips = data.draw(st.sets(st.integers(0, nbytes - 1), max_size=6))
    for at in flips:
        image[at] ^= 1 << (at % 8)
    assert mismatches(image, digests) == sorted({at // CELL_BYTES for at in flips})


def test_a_changed_digest_is_a_mismatch() -> None:
    image = content(3 * CELL_BYTES)
    digests = bytearray(cell_digests(image))
    digests[-1] ^= 1
    assert mismatches(image, digests) == [2]


def test_any_contiguous_buffer_counts_by_its_bytes() -> None:
    values = np.arange(40_000, dtype=np.float32).reshape(200, 200)
    assert cell_digests(values) == cell_digests(values.tobytes())
    assert cell_digests(np.empty((0, 4))) == b""
    with pytest.raises(ValueError, match="contiguous"):
        cell_digests(values[:, ::2])


@pytest.mark.parametrize("length", [0, DIGEST_BYTES, 3 * DIGEST_BYTES, 2 * DIGEST_BYTES - 1])
def test_a_wrong_number_of_digests_is_an_error(length: int) -> None:
    with pytest.raises(ValueError, match=f"2 cells, which take 32 bytes of digests; found {length}"):
        mismatches(bytes(CELL_BYTES + 1), bytes(length))


def test_a_negative_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="-1"):
        cells_of(-1)
