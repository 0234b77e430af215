"""The manifest: round trips, its size for large jobs, and everything it refuses."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_hexdigest

from ckptd.errors import CorruptCheckpoint
from ckptd.image import columns
from ckptd.image.manifest import Manifest, StoredLayout, StoredObject, StoredTensor
from ckptd.image.tile_classes import TileClass
from ckptd.layout.placements import Replicate, Shard, Strided, tiles


def manifest(ranks: int = 4) -> Manifest:
    shape = (10, 6)
    split = tiles(shape, (2, ranks // 2), [Shard(0), Replicate()], "a")
    objects = tuple(
        StoredObject(f"rank-{r:05}.safetensors", 4096 * (r + 1), bytes([r] * 16), r) for r in range(ranks)
    )
    tensors = (
        StoredTensor("a", "BF16", shape, 0),
        StoredTensor("b.c", "F32", shape, 0, differs=True),
        StoredTensor("empty", "I64", (0, 3), 1),
        StoredTensor("by.layout", "F32", (3,)),
    )
    empty = tiles((0, 3), (1,), [Replicate()], "empty")
    classes = (TileClass.from_tiles("a", split), TileClass.from_tiles("empty", empty))
    layout = StoredLayout("torch-ddp", "layout torch-ddp() { }", {"vocab": 7})
    return Manifest(
        "llama", 7, 1000, "distributed", ranks, objects, tensors, classes, (6, 900), (("tp", 2), ("dp",
        2)), layout,
        {"a": 2**64 - 1},
    )  # fmt: skip


def test_round_trip() -> None:
    written = manifest().write()
    read = Manifest.read(written)
    assert read.write() == written
    assert (read.job, read.generation, read.step, read.parent) == ("llama", 7, 1000, (6, 900))
    assert read.fingerprints == {"a": 2**64 - 1} and read.layout == manifest().layout
    found = read.tiles("b.c")
    assert found is not None and found.arrays == ("b.c",) and sorted(found.cover.tolist()) == [0, 0, 1, 1]
    assert read.tiles("by.layout") is None
    json.loads(written)  # any JSON reader takes it


def forged(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The manifest with something changed, and a digest that matches."""
    whole = json.loads(manifest().write())
    del whole["digest"]
    change(whole)
    text = json.dumps(whole, separators=(",", ":")).encode()[:-1]
    return text + b',"digest":"%b"}\n' % xxh3_128_hexdigest(text).encode()


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another version": lambda m: m.update({"ckptd.manifest": 2}),
    "an unknown field": lambda m: m.update(extra=1),
    "a missing field": lambda m: m.pop("step"),
    "a negative step": lambda m: m.update(step=-1),
    "a huge step": lambda m: m.update(step=1 << 60),
    "a boolean step": lambda m: m.update(step=True),
    "a float": lambda m: m.update(step=1.5),
    "not a number": lambda m: m.update(step=float("nan")),
    "a path for a job": lambda m: m.update(job="../x"),
    "a separator in an object": lambda m: m["objects"][0].__setitem__(0, "a/b"),
    "dots for an object": lambda m: m["objects"][0].__setitem__(0, ".."),
    "the manifest as an object": lambda m: m["objects"][0].__setitem__(0, "manifest.json"),
    "an object twice": lambda m: m["objects"].__setitem__(1, m["objects"][0]),
    "a rank beyond the world": lambda m: m["objects"][0].__setitem__(3, 4),
    "a short root": lambda m: m["objects"][0].__setitem__(2, "00"),
    "a foreign dtype": lambda m: m["tensors"][0].update(dtype="Q7"),
    "half a byte": lambda m: m["tensors"][0].update(dtype="F4"),
    "a tensor twice": lambda m: m["tensors"].append(m["tensors"][0]),
    "a reserved name": lambda m: m["tensors"][0].update(name="__ckptd.variable"),
    "a class that is not there": lambda m: m["tensors"][0].update(tiles=9),
    "another shape": lambda m: m["tensors"][0].update(shape=[9, 6]),
    "a larger shape": lambda m: m["tensors"][0].update(shape=[11, 6]),
    "an endless shape": lambda m: m["tensors"][3].update(shape=[1 << 40, 1 << 40]),
    "a shape of many dims": lambda m: m["tensors"][3].update(shape=[1] * 65),
    "no layout for what needs one": lambda m: m.update(layout=None),
    "an object that is not there": lambda m: m["classes"][0].update(place=[0, 1, 2, 4]),
    "too few boxes": lambda m: m["classes"][0].update(boxes=3),
    "too many boxes": lambda m: m["classes"][0].update(boxes=1 << 40),
    "a box moved": lambda m: m["classes"][0]["offsets"].__setitem__(0, [0, 0, 0, 5]),
    "strides of 0": lambda m: m["classes"][0]["strides"].__setitem__(1, [0, 0, 0, 0]),
    "a start beyond everything": lambda m: m["classes"][0].update(start=[1 << 52, 0, 0, 0]),
    "a negative start": lambda m: m["classes"][0].update(start=[-1, 0, 0, 0]),
    "a column of texts": lambda m: m["classes"][0].update(start=["0"] * 4),
    "a bomb of a column": lambda m: m["classes"][0].update(start=[[0, 1 << 30, 0, 1 << 30, 0]]),
    "an unnamed array": lambda m: m["classes"][0].update(arrays=["a"]),
    "a fingerprint of nothing": lambda m: m["fingerprints"].update(zz="0" * 16),
    "a list": lambda m: m.update(objects={}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_under_a_right_digest_is_refused(lie: str) -> None:
    data = forged(LIES[lie])
    begin = time.perf_counter()
    with pytest.raises(CorruptCheckpoint) as caught:
        Manifest.read(data)
    print(f"{lie}: {caught.value} ({time.perf_counter() - begin:.3f} s)")
    assert caught.value.why and caught.value.next


def test_every_changed_byte_is_refused() -> None:
    good = manifest().write()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 4
        with pytest.raises(CorruptCheckpoint):
            Manifest.read(bytes(bad))
    for cut in range(0, len(good), 7):
        with pytest.raises(CorruptCheckpoint):
            Manifest.read(good[:cut])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b"[" + b"[]," * 3_000_000 + b"0]",
        b'{"ckptd.manifest":1,"job":"a","job":"b"}',
        b'{"ckptd.manifest":' + b"9" * 10_000 + b"}",
        b'{"a":[' + b"0," * 5_000_000 + b"0]}",
        b"[" + b"[]," * 490_000 + b"0]",
        b" " * ((64 << 20) + 1),
        b'{"ckptd.manifest":1,"x":"\xff"}',
    ],
    ids=[
        "nothing",
        "empty",
        "deep",
        "many lists",
        "duplicate",
        "digits",
        "values",
        "lists",
        "long",
        "not ascii",
    ],
)
def test_bytes_that_are_no_manifest(data: bytes) -> None:
    begin = time.process_time()
    with pytest.raises(CorruptCheckpoint):
        Manifest.read(data)
    print(f"refused: {time.process_time() - begin:.2f} s")


def test_a_duplicate_key_is_named() -> None:
    with pytest.raises(CorruptCheckpoint, match=r"'job' is given twice"):
        Manifest.read(b'{"ckptd.manifest":1,"job":"a","job":"b"}')


def test_a_newer_version_says_so() -> None:
    with pytest.raises(CorruptCheckpoint, match="a newer ckptd may"):
        Manifest.read(forged(LIES["another version"]))


def test_16384_ranks_and_1000_tensors_stay_below_4_mib() -> None:
    tp, dp = 8, 2048
    shapes = [(50257, 12288), (8192, 8192), (28672, 8192), (8192, 28672), (8192,)]
    made = []
    for shape in shapes:
        where = [Strided(0, tp), Shard(0)] if len(shape) > 1 else [Shard(0), Replicate()]
        made.append(TileClass.from_tiles("x", tiles(shape, (dp, tp), where, "x")))
    generator = np.random.default_rng(3)
    objects = tuple(
        StoredObject(f"rank-{r:05}.safetensors", 12_345_678_901 + r, generator.bytes(16), r)
        for r in range(tp * dp)
    )
    tensors = tuple(
        StoredTensor(
            f"optimizer.model.layers.{i}.self_attention.linear_qkv.weight.exp_avg",
            "F32",
            shapes[i % 5],
            i % 5,
        )
        for i in range(1000)
    )
    written = Manifest("llama", 1, 1, "distributed", tp * dp, objects, tensors, tuple(made)).write()
    print(f"manifest: {len(written)} bytes")
    assert len(written) < 4 << 20
    assert Manifest.read(written).write() == written


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 6), max_size=60))
def test_columns_come_back(numbers: list[int]) -> None:
    column = np.array(numbers, np.int64)
    assert columns.unpack(columns.pack(column), len(column)).tolist() == numbers


def test_tiles_that_overlap_and_leave_a_gap_of_equal_size_are_refused() -> None:
    def overlap(m: dict[str, Any]) -> None:
        # 2 x 2 boxes of which one lies on another: the volumes still add up.
        made = tiles((4, 4), (2, 2), [Shard(0), Shard(1)], "a")
        offsets = made.offsets.copy()
        offsets[3] = offsets[0]
        m["classes"][0]["offsets"] = [offsets[:, 0].tolist(), offsets[:, 1].tolist()]
        m["classes"][0]["sizes"] = [[2] * 4, [2] * 4]
        m["classes"][0]["cover"] = [0] * 4
        for tensor in m["tensors"][:2]:
            tensor["shape"] = [4, 4]

    with pytest.raises(CorruptCheckpoint, match="overlap or leave"):
        Manifest.read(forged(overlap))
