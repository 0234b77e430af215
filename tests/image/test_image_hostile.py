"""Hostile headers: refused with CorruptImage, quickly, and before anything is allocated."""

from __future__ import annotations

import json
import random
import time
import tracemalloc

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from ckptd.errors import CorruptImage
from ckptd.image import ImagePlan, TensorSpec

PLAN = ImagePlan.build(
    [TensorSpec("a", "F32", (4, 4)), TensorSpec("b", "I8", (5,)), TensorSpec("c", "BF16", (0, 3))],
    objects_capacity=64,
)
TEXT = PLAN.header[8:].rstrip(b" ")
DATA = PLAN.image_bytes - len(PLAN.header)
META = b'{"__metadata__":{"format":"pt","ckptd":"image/1"}'


def image_with(text: bytes, data: int = DATA) -> memoryview:
    """An image with this JSON, padded as ours is."""
    reserved = -(-(8 + len(text)) // 4096) * 4096 - 8
    return memoryview(reserved.to_bytes(8, "little") + text.ljust(reserved) + bytes(data))


def swapped(old: bytes, new: bytes) -> bytes:
    assert TEXT.count(old) == 1, old
    return TEXT.replace(old, new)


def variable(begin: int, nbytes: int = 256) -> bytes:
    return b',"__ckptd.variable":{"dtype":"U8","shape":[%d],"data_offsets":[%d,%d]}}' % (
        nbytes,
        begin,
        begin + nbytes,
    )


DEEP = b'{"a":' * 100_000
MANY = META + b"".join(b',"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(500_000))
HOSTILE: dict[str, tuple[memoryview, str]] = {
    "empty": (memoryview(b""), "0 bytes are too few"),
    "seven bytes": (memoryview(bytes(7)), "7 bytes are too few"),
    "huge length": (memoryview(b"\xff" * 8 + bytes(5000)), "claims 18446744073709551615 bytes"),
    "length just beyond the limit": (
        memoryview(((64 << 20) + 1).to_bytes(8, "little") + bytes(100)),
        "at most 67108864",
    ),
    "length beyond the image": (memoryview((4088).to_bytes(8, "little") + bytes(4087)), "the image has 4095"),
    "length zero": (memoryview(bytes(4096)), "begins at byte 8"),
    "unaligned data": (memoryview((4089).to_bytes(8, "little") + bytes(9000)), "begins at byte 4097"),
    "no JSON": (image_with(b"\0" * 100), "byte 8 of its header"),
    "not an object": (image_with(b"[]"), "byte 8 of its header"),
    "bad UTF-8": (image_with(swapped(b'"a"', b'"\xff"')), "found b"),
    "valid UTF-8 unescaped": (image_with(swapped(b'"a"', '"ä"'.encode())), "found b"),
    "other metadata": (image_with(swapped(b'"image/1"', b'"image/2"')), "image/1"),
    "white space": (image_with(swapped(b'"a":', b'"a": ')), "byte 57"),
    "cut off": (image_with(TEXT[:-1]), "expected }"),
    "something behind": (image_with(TEXT + b"{}"), "spaces up to the end"),
    "tab behind": (image_with(TEXT + b"\t"), "spaces up to the end"),
    "more reserve than needed": (image_with(TEXT + b" " * 4096), "data begins at byte 8192, expected 4096"),
    "deep": (image_with(DEEP), "byte 8 of its header"),
    "deep shape": (image_with(swapped(b"[4,4]", b"[" * 5000 + b"]" * 5000)), "expected"),
    "duplicate key": (image_with(swapped(b'"b":', b'"a":')), "'a' is given twice"),
    "duplicate key, escaped": (image_with(swapped(b'"b":', b'"\\u0061":')), "'a' is given twice"),
    "not canonically escaped": (image_with(swapped(b'"b":', b'"\\u0062":')), "found"),
    "lone surrogate": (image_with(swapped(b'"b":', b'"\\ud800":')), "cannot be printed"),
    "control character": (image_with(swapped(b'"b":', b'"\\u000a":')), "cannot be printed"),
    "long name": (image_with(swapped(b'"b":', b'"%b":' % (b"b" * 513))), "513 characters"),
    "endless name": (image_with(swapped(b'"b":', b'"%b":' % (b"b" * 1_000_000))), "expected"),
    "empty name": (image_with(swapped(b'"b":', b'"":')), "expected"),
    "metadata twice": (image_with(swapped(b'"b":', b'"__metadata__":')), "reserved"),
    "foreign reserved name": (image_with(swapped(b'"b":', b'"__ckptd.x":')), "found"),
    "hole": (image_with(swapped(b"[64,69]", b"[65,70]")), "'b' begins at byte 65 of the data, expected 64"),
    "overlap": (
        image_with(swapped(b"[64,69]", b"[60,65]")),
        "'b' begins at byte 60 of the data, expected 64",
    ),
    "backwards": (image_with(swapped(b"[64,69]", b"[64,63]")), "ends at byte 63"),
    "size and offsets differ": (image_with(swapped(b"[4,4]", b"[4,5]")), "takes 80 bytes"),
    "beyond the end": (image_with(swapped(b"[64,69]", b"[64,999999999]")), "ends at byte 999999999"),
    "overflow": (image_with(swapped(b"[64,69]", b"[64,18446744073709551621]")), "expected"),
    "negative": (image_with(swapped(b"[4,4]", b"[-4,-4]")), "expected"),
    "bool as int": (image_with(swapped(b"[64,69]", b"[true,69]")), "expected"),
    "float": (image_with(swapped(b"[64,69]", b"[64.0,69]")), "expected"),
    "exponent": (image_with(swapped(b"[5]", b"[5e0]")), "expected"),
    "leading zero": (image_with(swapped(b"[5]", b"[05]")), "expected"),
    "string": (image_with(swapped(b"[5]", b'["5"]')), "expected"),
    "null": (image_with(swapped(b"[5]", b"null")), "expected"),
    "too many dims": (image_with(swapped(b"[4,4]", b"[16%b]" % (b",1" * 64))), "expected"),
    "unknown dtype": (image_with(swapped(b'"BF16"', b'"C128"')), "unknown dtype C128"),
    "further key": (image_with(swapped(b'"shape":[5],', b'"shape":[5],"x":1,')), "expected"),
    "no pad": (
        image_with(META + b',"b":{"dtype":"I8","shape":[5],"data_offsets":[0,5]}' + variable(5), 261),
        "found",
    ),
    "pad too many": (
        image_with(
            META + b',"__ckptd.pad.0":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}' + variable(64), 320
        ),
        "found",
    ),
    "no tensors": (image_with(META + b"}", 0), "its last tensor is None"),
    "variable not last": (image_with(swapped(b'"__ckptd.variable"', b'"d"')), "its last tensor is 'd'"),
    "variable too small": (image_with(META + variable(0, 64), 64), "found"),
    "variable of no round size": (image_with(META + variable(0, 257), 257), "found"),
    "total too short": (image_with(TEXT, DATA - 1), "describes 4544 bytes, the image has 4543"),
    "total too long": (image_with(TEXT, DATA + 1), "describes 4544 bytes, the image has 4545"),
    "500,000 tensors": (image_with(MANY + variable(0), 256), "500001 entries, at most 400001"),
    "overflowing product": (
        image_with(
            META
            + b',"a":{"dtype":"U8","shape":[%b,0],"data_offsets":[0,0]}' % (b",".join([b"9" * 15] * 60))
            + variable(0),
            256,
        ),
        "beyond",
    ),
}


def test_the_corpus_starts_from_a_good_image() -> None:
    assert ImagePlan.parse(image_with(TEXT)) == PLAN


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_quickly(case: str) -> None:
    image, why = HOSTILE[case]
    started = time.thread_time()
    with pytest.raises(CorruptImage) as caught:
        ImagePlan.parse(image)
    assert time.thread_time() - started < 1.0, "seconds of this thread's own"
    assert why in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert str(caught.value).isascii()


def test_memory_follows_the_bytes_that_are_there_not_those_that_are_claimed() -> None:
    cases = {name: image for name, (image, _) in HOSTILE.items() if len(image) < 2_000_000}
    for case, image in cases.items():
        tracemalloc.start()
        with pytest.raises(CorruptImage):
            ImagePlan.parse(image)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000 + 4 * len(image), case


def test_any_single_changed_byte_of_the_header_is_refused_or_another_plan() -> None:
    rng = random.Random(11)
    good = image_with(TEXT)
    for at in range(len(PLAN.header)):
        image = memoryview(bytearray(good))
        image[at] ^= 1 << rng.randrange(8)
        try:
            found = ImagePlan.parse(image)
        except CorruptImage:
            continue
        # Another plan is one that stock safetensors reads, with another hash: a renamed tensor, say.
        assert found.plan_hash != PLAN.plan_hash
        assert found.header == bytes(image[: len(found.header)])
        safetensors.deserialize(bytes(image))


def test_what_stock_safetensors_writes_is_not_an_image_of_ours() -> None:
    theirs = safetensors.numpy.save({"a": np.zeros(4096, np.uint8)})
    with pytest.raises(CorruptImage):
        ImagePlan.parse(memoryview(theirs))


def test_a_header_says_nothing_that_json_does_not() -> None:
    assert json.loads(PLAN.header[8:])["b"] == {"dtype": "I8", "shape": [5], "data_offsets": [64, 69]}
