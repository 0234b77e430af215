"""Hostile objects: refused with CorruptImage, quickly, whatever they claim."""

from __future__ import annotations

import base64
import json
import random
import time
import tracemalloc

import pytest

from ckptd.errors import CorruptImage
from ckptd.image import decode, encode


def tree(text: str) -> bytes:
    return b'{"ckptd.objects":1,"tree":%b}' % text.encode()


def tagged(tag: str, **fields: object) -> bytes:
    return tree(json.dumps({"$": tag, **fields}))


B64 = base64.b64encode(bytes(8)).decode()
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "JSON cannot be read"),
    "not ASCII": (b'{"ckptd.objects":1,"tree":"\xc3\xa9"}', "JSON cannot be read"),
    "not an object": (b"[]", "expected"),
    "another version": (b'{"ckptd.objects":2,"tree":1}', "found version 2"),
    "bool as version": (b'{"ckptd.objects":true,"tree":1}', "found version True"),
    "further key": (b'{"ckptd.objects":1,"tree":1,"x":1}', "expected"),
    "key twice": (tree('{"a":1,"a":2}'), "key twice"),
    "something behind": (tree("1") + b"x", "JSON cannot be read"),
    "NaN": (tree("NaN"), "found NaN"),
    "Infinity": (tree("[-Infinity]"), "found -Infinity"),
    "overflowing float": (tree("1e999"), "range of a double"),
    "endless int": (tree("9" * 5000), "JSON cannot be read"),
    "deep lists": (tree("[" * 100_000 + "]" * 100_000), "nested"),
    "deep objects": (tree('{"a":' * 100_000 + "1" + "}" * 100_000), "nested"),
    "deep and never closed": (b"[" * 1_000_000, "nested"),
    "many empty lists": (tree("[" + "[]," * 5_000_000 + "1]"), "more than"),
    "too long": (tree('"' + "a" * (64 << 20) + '"'), "at most 67108864"),
    "unknown tag": (tagged("pickle", v=B64), "'pickle' is unknown"),
    "tag of another type": (tree('{"$":["tuple"],"v":[]}'), "is unknown"),
    "missing key": (tagged("deque", v=[]), "has the keys"),
    "unexpected key": (tagged("tuple", v=[], n=1), "has the keys"),
    "tuple of a string": (tagged("tuple", v="abc"), "holds no list"),
    "pairs of three": (tagged("dict", v=[[1, 2, 3]]), "no list of pairs"),
    "pairs of text": (tagged("Counter", v=["ab"]), "no list of pairs"),
    "unhashable key": (tagged("dict", v=[[[], 1]]), "cannot be one"),
    "pairs with a key twice": (tagged("dict", v=[[1, 1], [1.0, 2]]), "key twice"),
    "unhashable element": (tagged("set", v=[[]]), "cannot be one"),
    "element twice": (tagged("frozenset", v=[1, 1]), "twice"),
    "unknown factory": (tagged("defaultdict", v=[], f="eval"), "'eval' is unknown"),
    "factory of another type": (tagged("defaultdict", v=[], f=["int"]), "is unknown"),
    "deque beyond its length": (tagged("deque", v=[1, 2], n=1), "maximal length 1"),
    "deque of huge length": (tagged("deque", v=[], n=1 << 80), "maximal length"),
    "deque of negative length": (tagged("deque", v=[], n=-1), "maximal length -1"),
    "float of few digits": (tagged("float", v="7ff"), "holds '7ff'"),
    "float of no text": (tagged("float", v=1), "holds 1"),
    "int of no digits": (tagged("int", v="0x"), "holds '0x'"),
    "int with other signs": (tagged("int", v="0x_1"), "holds '0x_1'"),
    "complex of one": (tagged("complex", v="0" * 16), "holds '0000"),
    "complex of ints": (tagged("complex", v=[1, 2]), "holds [1, 2]"),
    "no base64": (tagged("bytes", v="@@@@"), "no base64"),
    "base64 cut off": (tagged("bytes", v=B64[:-1]), "no base64"),
    "base64 of another type": (tagged("bytes", v=[1]), "no base64"),
    "base64 not ASCII": (tagged("bytes", v="ä"), "no base64"),
    "bad text": (tagged("str", v=base64.b64encode(b"\xff").decode()), "string cannot be read"),
    "object array": (tagged("array", d="|O", s=[1], v=B64), "'|O' is unknown"),
    "dtype language": (tagged("array", d="(1000000000,)i8", s=[1], v=B64), "is unknown"),
    "dtype of another type": (tagged("array", d=["<i8"], s=[1], v=B64), "is unknown"),
    "shape of another type": (tagged("array", d="<i8", s=1, v=B64), "has the shape 1"),
    "negative shape": (tagged("array", d="<i8", s=[-1], v=B64), "has the shape [-1]"),
    "bool in a shape": (tagged("array", d="<i8", s=[True], v=B64), "has the shape [True]"),
    "shape too large": (tagged("array", d="<i8", s=[2], v=B64), "has 8 bytes"),
    "huge shape": (tagged("array", d="<i8", s=[1 << 40], v=B64), "more than 16777216 bytes"),
    "huge empty shape": (tagged("array", d="<i8", s=[1 << 62, 1 << 62, 0], v=""), "more than"),
    "too many dims": (tagged("array", d="<i8", s=[1] * 65, v=B64), "65 dims"),
    "scalar too short": (tagged("scalar", d="<i4", v=B64), "has 8 bytes"),
    "tensor without name": (tagged("tensor", v=1), "no name"),
    "tensor of ours": (tagged("tensor", v="__ckptd.variable"), "reserved"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_objects_are_refused_quickly(case: str) -> None:
    data, why = HOSTILE[case]
    started = time.thread_time()
    with pytest.raises(CorruptImage) as caught:
        decode(data)
    assert time.thread_time() - started < 2.0, "seconds of this thread's own"
    assert why in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_memory_follows_the_bytes_that_are_there() -> None:
    for case, (data, _) in HOSTILE.items():
        if len(data) > 100_000:
            continue
        tracemalloc.start()
        with pytest.raises(CorruptImage):
            decode(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000 + 20 * len(data), case


def test_brackets_inside_strings_count_for_nothing() -> None:
    state = {"text": "[" * 5000 + '\\"{' * 5000, "]": ["}", "\\", '"']}
    assert decode(encode(state)) == state


def test_damaged_bytes_are_refused_or_read_as_something_that_encodes_again() -> None:
    good = encode({"a": (1, 2.5, None), 3: b"xyz", "s": {1, 2}, "d": [float("inf")] * 3})
    rng = random.Random(5)
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            found = decode(data)
        except CorruptImage:
            continue
        encode(found)


def test_any_buffer_is_read() -> None:
    data = encode({"a": 1})
    assert decode(bytearray(data)) == decode(memoryview(data)) == {"a": 1}
