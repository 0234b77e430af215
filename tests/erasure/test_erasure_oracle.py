"""The code against `reedsolo` itself: every (k, m) with k + m <= 12, every erasure pattern.

By default the patterns that lose exactly m symbols, which are the hardest and contain
all others; with --soak every pattern of 0..m losses and stock reedsolo's own repair of each.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reedsolo

from ckptd.erasure import Code
from ckptd.erasure.galois import Bytes
from ckptd.erasure.kernel import Kernel

MAX_SYMBOLS = 12
# Random bytes columns, each a codeword; more than one vector register of them would say no more here.
COLUMNS = 5
CODES = [(n - m, m) for n in range(2, MAX_SYMBOLS + 1) for m in range(1, n)]


def codewords(k: int, m: int) -> Bytes:
    """Symbols by columns, shape (k + m, COLUMNS), as reedsolo encodes them."""
    data = np.random.default_rng(1000 * k + m).integers(0, 256, (COLUMNS, k), dtype=np.uint8)
    codec = reedsolo.RSCodec(m)
    words = [np.frombuffer(codec.encode(row.tobytes()), dtype=np.uint8) for row in data]
    return np.ascontiguousarray(np.array(words).T)


def decode_all(coder: Code, symbols: Bytes, lost: tuple[int, ...]) -> None:
    missing = {index: bytearray(COLUMNS) for index in lost}
    coder.decode({i: symbols[i] for i in range(len(symbols)) if i not in missing}, missing)
    for index, row in missing.items():
        assert row == symbols[index].tobytes(), f"{coder}: lost {lost}, symbol {index} is wrong"


def test_parity_is_reedsolos(kernel: Kernel) -> None:
    for k, m in CODES:
        symbols, coder = codewords(k, m), Code(k, m, kernel)
        encoded = np.zeros((m, COLUMNS), dtype=np.uint8)
        coder.encode(list(symbols[:k]), list(encoded))
        assert np.array_equal(encoded, symbols[k:])
        folded = np.zeros((m, COLUMNS), dtype=np.uint8)
        for index in range(k):
            coder.update(index, symbols[index], list(folded))
        assert np.array_equal(folded, symbols[k:])
        for p in range(m):
            alone = bytearray(COLUMNS)
            for index in range(k):
                coder.update_one(index, p, symbols[index], alone)
            assert alone == symbols[k + p].tobytes()
    print(f"{kernel.name}: {len(CODES)} codes, {COLUMNS} columns each, encode = update = reedsolo")


def test_every_full_erasure_pattern(kernel: Kernel) -> None:
    patterns = 0
    for k, m in CODES:
        symbols, coder = codewords(k, m), Code(k, m, kernel)
        for lost in itertools.combinations(range(k + m), m):
            decode_all(coder, symbols, lost)
            patterns += 1
    # Per n, all subsets but the empty and the full one.
    assert patterns == sum(2**n - 2 for n in range(2, MAX_SYMBOLS + 1))
    print(
        f"{kernel.name}: {len(CODES)} codes, {patterns} patterns of exactly m losses, {COLUMNS} columns each"
    )


def test_stock_reedsolo_repairs_our_stripes() -> None:
    """Erasures at the first, last and alternate places; --soak does all of them."""
    repairs = 0
    for k, m in CODES:
        first = tuple(range(m))
        for lost in {first, tuple(range(k, k + m)), tuple(range(0, k + m, 2))[:m]}:
            repair_with_reedsolo(k, m, lost)
            repairs += 1
    print(f"{repairs} stripes repaired by stock reedsolo")


def repair_with_reedsolo(k: int, m: int, lost: tuple[int, ...]) -> None:
    data = [bytes([17 * i + 1 & 0xFF]) for i in range(k)]
    parity = [bytearray(1) for _ in range(m)]
    Code(k, m).encode(data, parity)
    word = b"".join([*data, *map(bytes, parity)])
    damaged = bytearray(word)
    for index in lost:
        damaged[index] ^= 0x5A
    repaired = reedsolo.RSCodec(m).decode(bytes(damaged), erase_pos=list(lost), only_erasures=True)[1]
    assert repaired == word, f"k = {k}, m = {m}, lost {lost}"


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_every_erasure_pattern_of_every_size(kernel: Kernel) -> None:
    patterns = 0
    for k, m in CODES:
        symbols, coder = codewords(k, m), Code(k, m, kernel)
        for size in range(m + 1):
            for lost in itertools.combinations(range(k + m), size):
                decode_all(coder, symbols, lost)
                patterns += 1
    print(f"{kernel.name}: {len(CODES)} codes, {patterns} patterns of 0..m losses, {COLUMNS} columns each")


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_stock_reedsolo_repairs_every_pattern() -> None:
    repairs = 0
    for k, m in CODES:
        for size in range(1, m + 1):
            for lost in itertools.combinations(range(k + m), size):
                repair_with_reedsolo(k, m, lost)
                repairs += 1
    print(f"{repairs} stripes repaired by stock reedsolo")
