"""The field and the matrices, against reedsolo's own arithmetic."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reedsolo

from ckptd.erasure import galois, matrix
from ckptd.errors import NotEnoughCells


def test_products_are_reedsolos() -> None:
    reedsolo.init_tables(0x11D)
    for a, b in itertools.product(range(256), repeat=2):
        assert galois.multiply(a, b) == reedsolo.gf_mul(a, b)


def test_inverse_and_power() -> None:
    for a in range(1, 256):
        assert galois.multiply(a, galois.inverse(a)) == 1
        product = 1
        for exponent in range(4):
            assert galois.power(a, exponent) == product
            product = galois.multiply(product, a)
    assert galois.power(2, 1000) == galois.power(2, 1000 % 255)
    assert (galois.power(0, 0), galois.power(0, 3)) == (1, 0)
    with pytest.raises(ValueError, match="zero has no inverse"):
        galois.inverse(0)


def test_tables_cannot_be_changed() -> None:
    for table in (galois.EXP, galois.LOG, galois.PRODUCT):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 1


@pytest.mark.parametrize("m", [1, 2, 3, 8, 127, 254])
def test_generator_polynomial_is_reedsolos(m: int) -> None:
    reedsolo.init_tables(0x11D)
    assert matrix.generator_polynomial(m).tolist() == list(reedsolo.rs_generator_poly(m))


@pytest.mark.parametrize(("k", "m"), [(1, 1), (4, 2), (254, 1), (1, 254), (200, 55), (13, 17)])
def test_parity_rows_are_reedsolos_columns(k: int, m: int) -> None:
    rows = matrix.parity_rows(k, m)
    codec = reedsolo.RSCodec(m)
    for column in {0, k // 2, k - 1}:
        unit = bytearray(k)
        unit[column] = 1
        assert codec.encode(bytes(unit))[k:] == rows[:, column].tobytes()
    if m == 1:
        assert np.all(rows == 1), "one parity is plain XOR"


@pytest.mark.parametrize(("k", "m"), [(0, 1), (1, 0), (-1, 3), (200, 56), (255, 1)])
def test_impossible_codes_are_refused(k: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} and m = {m}"):
        matrix.parity_rows(k, m)


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_inverse_matrix(size: int) -> None:
    random = np.random.default_rng(size)
    found = 0
    while found < 3:
        square = random.integers(0, 256, (size, size), dtype=np.uint8)
        try:
            inverse = matrix.invert(square)
        except ValueError:
            continue
        assert np.array_equal(galois.dot(square, inverse), np.eye(size, dtype=np.uint8))
        found += 1


def test_inverse_needs_row_exchanges() -> None:
    exchange = np.eye(4, dtype=np.uint8)[[2, 0, 3, 1]]
    assert np.array_equal(matrix.invert(exchange), exchange.T)


def test_matrices_without_inverse() -> None:
    with pytest.raises(ValueError, match="no pivot for column 1 of 2"):
        matrix.invert(np.array([[1, 2], [2, 4]], dtype=np.uint8))
    with pytest.raises(ValueError, match="square"):
        matrix.invert(np.ones((2, 3), dtype=np.uint8))


def test_decode_matrix_keeps_the_order_asked_for() -> None:
    one = matrix.decode_matrix(3, 2, [0, 3, 4], [1])
    two = matrix.decode_matrix(3, 2, [0, 3, 4], [2])
    assert np.array_equal(matrix.decode_matrix(3, 2, [4, 0, 3], [2, 1]), np.vstack([two, one]))


def test_too_few_symbols_say_needed_and_found() -> None:
    with pytest.raises(NotEnoughCells, match="4 symbols needed, 3 found") as caught:
        matrix.decode_matrix(4, 2, [0, 2, 5], [1])
    assert caught.value.exit_code == 4
    assert "covers the loss of 2, but 3 are missing" in str(caught.value)


@pytest.mark.parametrize(
    ("present", "missing", "message"),
    [
        ([0, 1, 5], [2], r"symbols \[5\] do not exist: k = 3, m = 2 has 0..4"),
        ([0, 1, 2], [-1], r"symbols \[-1\] do not exist"),
        ([0, 1, 1], [2], "named twice"),
        ([0, 1, 2], [3, 3], "named twice"),
        ([0, 1, 2], [2], r"symbols \[2\] are named both present and missing"),
    ],
)
def test_wrong_symbols_are_refused(present: list[int], missing: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matrix.decode_matrix(3, 2, present, missing)
