"""`Code` over callers' buffers: what it accepts, refuses, and leaves alone."""

from __future__ import annotations

import mmap
import threading

import numpy as np
import pytest
import reedsolo
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.erasure import Code, code
from ckptd.erasure.kernel import Kernel
from ckptd.errors import NotEnoughCells


def random_rows(seed: int, count: int, length: int) -> list[bytes]:
    return [row.tobytes() for row in np.random.default_rng(seed).integers(0, 256, (count, length), np.uint8)]


def zeros(count: int, length: int) -> list[bytearray]:
    return [bytearray(length) for _ in range(count)]


@pytest.mark.parametrize("length", [0, 1, 31, 33, 65537])
@pytest.mark.parametrize(("k", "m"), [(4, 2), (3, 1), (1, 1), (2, 7)])
def test_everything_at_odd_lengths(kernel: Kernel, k: int, m: int, length: int) -> None:
    coder = Code(k, m, kernel)
    data, parity = random_rows(length, k, length), zeros(m, length)
    coder.encode(data, parity)
    codec = reedsolo.RSCodec(m)
    for at in {0, length // 2, length - 1} if length else ():
        assert codec.encode(bytes(row[at] for row in data))[k:] == bytes(row[at] for row in parity)

    together, alone = zeros(m, length), zeros(m, length)
    for index in reversed(range(k)):
        coder.update(index, data[index], together)
        for p in range(m):
            coder.update_one(index, p, data[index], alone[p])
    assert together == parity and alone == parity

    symbols = [*data, *map(bytes, parity)]
    lost = range(min(k, m))
    missing = {index: bytearray(length) for index in lost}
    coder.decode({i: symbols[i] for i in range(k + m) if i not in missing}, missing)
    assert [bytes(missing[index]) for index in lost] == data[: len(lost)]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_code_any_pattern(kernel: Kernel, draw: st.DataObject) -> None:
    n = draw.draw(st.integers(2, 255) | st.integers(2, 20), label="n")
    m = draw.draw(st.integers(1, n - 1), label="m")
    k = n - m
    length = draw.draw(st.integers(0, 130), label="length")
    data = random_rows(draw.draw(st.integers(0, 2**32), label="seed"), k, length)
    parity = zeros(m, length)
    coder = Code(k, m, kernel)
    coder.encode(data, parity)
    symbols = [*data, *map(bytes, parity)]
    if length:
        assert reedsolo.RSCodec(m).encode(bytes(row[-1] for row in data))[k:] == bytes(
            row[-1] for row in parity
        )
    order = draw.draw(st.permutations(range(n)), label="order")
    missing = {index: bytearray(length) for index in order[: draw.draw(st.integers(0, m), label="lost")]}
    present = {index: symbols[index] for index in order if index not in missing}
    coder.decode(present, missing)
    assert all(bytes(row) == symbols[index] for index, row in missing.items())


def test_buffers_of_every_kind_without_a_copy(kernel: Kernel) -> None:
    length = 4096
    coder = Code(4, 2, kernel)
    rows = random_rows(3, 4, length)
    anonymous = mmap.mmap(-1, length)
    anonymous[:] = rows[1]
    data = [rows[0], anonymous, memoryview(rows[2]), np.frombuffer(rows[3], dtype=np.float32).reshape(2, -1)]
    parity_map = mmap.mmap(-1, length)
    parity = [parity_map, np.zeros(length // 8, dtype=np.int64)]
    coder.encode(data, parity)
    expected = zeros(2, length)
    coder.encode(rows, expected)
    assert parity_map[:] == expected[0] and parity[1].tobytes() == expected[1]
    # Nothing holds on to a buffer after the call: a held mmap would refuse to close.
    parity_map.close()
    data[1] = b""
    anonymous.close()


def test_any_range_can_be_done_alone(kernel: Kernel) -> None:
    length, coder = 1000, Code(3, 2, kernel)
    data = random_rows(4, 3, length)
    whole, pieces = zeros(2, length), zeros(2, length)
    coder.encode(data, whole)
    for start, stop in ((0, 1), (1, 64), (64, 511), (511, 1000)):
        cut = slice(start, stop)
        coder.encode([memoryview(row)[cut] for row in data], [memoryview(row)[cut] for row in pieces])
    assert pieces == whole
    changed = bytes(100)
    delta = bytes(a ^ b for a, b in zip(data[1][300:400], changed, strict=True))
    coder.update(1, delta, [memoryview(row)[300:400] for row in pieces])
    coder.encode([data[0], data[1][:300] + changed + data[1][400:], data[2]], whole)
    assert pieces == whole


def test_neighbours_of_a_range_stay(kernel: Kernel) -> None:
    coder, frame = Code(2, 2, kernel), np.full((4, 200), 0xEE, dtype=np.uint8)
    for length in (1, 31, 33, 63, 65):
        inside = slice(64, 64 + length)
        views = [memoryview(row)[inside] for row in frame]
        coder.encode(views[:2], views[2:])
        coder.update(0, views[0], views[2:])
        coder.decode({0: views[0], 1: views[1]}, {2: views[2], 3: views[3]})
        outside = np.delete(frame, np.s_[inside], axis=1)
        assert np.all(outside == 0xEE)
        frame[:] = 0xEE


def test_one_buffer_may_be_read_twice(kernel: Kernel) -> None:
    page, row, parity = bytes(64), random_rows(5, 1, 64)[0], zeros(1, 64)
    Code(3, 1, kernel).encode([page, row, page], parity)
    assert parity[0] == row


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, b: c.encode([b[0]], b[2:4]), "2 data buffers needed, 1 given"),
        (lambda c, b: c.encode(b[:2], b[2:5]), "2 parity buffers needed, 3 given"),
        (lambda c, b: c.encode([b[0], b[1][:9]], b[2:4]), r"data\[0\] has 10 bytes, data\[1\] has 9"),
        (lambda c, b: c.encode(b[:2], [b[2], b"0123456789"]), r"parity\[1\] is read-only"),
        (lambda c, b: c.encode(b[:2], [b[2], b[2]]), r"parity\[0\] and parity\[1\] overlap"),
        (lambda c, b: c.encode(b[:2], [b[1], b[2]]), r"data\[1\] and parity\[0\] overlap"),
        (lambda c, b: c.encode([b[0], b[1][::2]], b[2:4]), r"data\[1\] is not one contiguous buffer"),
        (lambda c, b: c.update(2, b[0], b[2:4]), r"data symbol 2 does not exist: the code has 0..1"),
        (lambda c, b: c.update(-1, b[0], b[2:4]), "data symbol -1 does not exist"),
        (lambda c, b: c.update(0, b[0], b[2:3]), "2 parity buffers needed, 1 given"),
        (lambda c, b: c.update(0, b[0], [b[2], b[0]]), r"chunk and parity\[1\] overlap"),
        (lambda c, b: c.update_one(0, 2, b[0], b[2]), "parity symbol 2 does not exist"),
        (lambda c, b: c.update_one(2, 0, b[0], b[2]), "data symbol 2 does not exist"),
        (lambda c, b: c.update_one(0, 1, b[0], b[2][:3]), r"chunk has 10 bytes, parity\[1\] has 3"),
        (lambda c, b: c.decode({0: b[0], 3: b[3]}, {1: b[1][:4]}), "symbol 0 has 10 bytes, symbol 1 has 4"),
        (lambda c, b: c.decode({0: b[0], 1: b[1]}, {1: b[2]}), r"\[1\] are named both present and missing"),
        (lambda c, b: c.decode({0: b[0], 4: b[1]}, {1: b[2]}), r"\[4\] do not exist"),
        (lambda c, b: c.decode({9: b[0]}, {}), r"\[9\] do not exist"),
    ],
)
def test_mistakes_are_named_and_change_nothing(call, message: str) -> None:  # type: ignore[no-untyped-def]
    whole = bytearray(range(60))
    buffers = [memoryview(whole)[i * 10 : i * 10 + 10] for i in range(6)]
    with pytest.raises(ValueError, match=message):
        call(Code(2, 2), buffers)
    assert whole == bytearray(range(60))


def test_partial_overlap_is_refused() -> None:
    whole = memoryview(bytearray(100))
    with pytest.raises(ValueError, match="chunk and parity\\[0\\] overlap"):
        Code(2, 1).update(0, whole[0:20], [whole[19:39]])
    Code(2, 1).update(0, whole[0:20], [whole[20:40]])


def test_objects_without_buffers_are_refused() -> None:
    with pytest.raises(TypeError, match="bytes-like"):
        Code(1, 1).encode([[1, 2, 3]], [bytearray(3)])  # type: ignore[list-item]


def test_too_few_symbols() -> None:
    kept = bytearray(b"abc")
    with pytest.raises(NotEnoughCells, match="3 symbols needed, 2 found"):
        Code(3, 2).decode({0: bytes(3), 4: bytes(3)}, {1: kept})
    assert kept == b"abc"


def test_impossible_codes() -> None:
    for k, m in ((0, 1), (1, 0), (250, 6)):
        with pytest.raises(ValueError, match="at most 255"):
            Code(k, m)
    assert repr(Code(2, 1)).startswith("Code(k=2, m=1, kernel=")


def test_tables_are_made_once(kernel: Kernel) -> None:
    data, parity = random_rows(6, 4, 64), zeros(2, 64)
    Code(4, 2, kernel).encode(data, parity)

    def work() -> None:
        coder = Code(4, 2, kernel)
        coder.update_one(3, 1, data[3], bytearray(64))
        coder.decode({5: parity[1], 1: data[1], 0: data[0], 2: data[2]}, {4: bytearray(64), 3: bytearray(64)})

    work()
    caches = (code._parity_product, code._row_product, code._decoder)
    made = [cache.cache_info().misses for cache in caches]
    work()
    assert [cache.cache_info().misses for cache in caches] == made


def test_threads_share_a_code(kernel: Kernel) -> None:
    coder, length = Code(4, 2, kernel), 1 << 16
    data = [random_rows(seed, 4, length) for seed in range(4)]
    expected = [zeros(2, length) for _ in data]
    for rows, parity in zip(data, expected, strict=True):
        coder.encode(rows, parity)
    got = [zeros(2, length) for _ in data]

    def work(which: int) -> None:
        for _ in range(10):
            coder.encode(data[which], got[which])

    threads = [threading.Thread(target=work, args=(which,)) for which in range(len(data))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert got == expected
