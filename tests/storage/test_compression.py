"""Compressed checkpoints read like others, by ranges; hostile frames are refused within their budget."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

import ckptd
from ckptd.errors import CorruptCheckpoint
from ckptd.image import ImagePlan, TensorSpec
from ckptd.image.manifest import Manifest, Packed
from ckptd.storage import compression
from ckptd.storage.compression import GROUP_BYTES, pack_group, unpack_group
from ckptd.storage.local_store import LocalStore
from ckptd.storage.parts import Part
from ckptd.storage.reading import open_checkpoint
from ckptd.storage.store import Reader

FILE = "rank-00000.safetensors"
BOMB_BYTES = 64 << 20
NOISE = np.random.default_rng(5).bytes(100_000)


def state() -> dict[str, Any]:
    """Floats as training has them, in bf16 and fp32; a few groups, one of noise."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(700, 1024, generator=generator) * 0.02
    return {
        "w": weights,
        "half": weights.bfloat16(),
        "noise": torch.randint(0, 256, (1_500_000,), generator=generator, dtype=torch.uint8),
        "zeros": torch.zeros(5000, dtype=torch.int64),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "epoch": 11,
    }


def saved(directory: Path, **options: Any) -> Manifest:
    return ckptd.save(str(directory), state(), step=5, **options)


@settings(deadline=None, max_examples=60)
@given(
    data=st.binary(min_size=1, max_size=3000), width=st.sampled_from([1, 2, 4, 8]), copies=st.integers(1, 40)
)
def test_a_group_comes_back(data: bytes, width: int, copies: int) -> None:
    group = data * copies
    frame, kept = pack_group(group, width)
    assert len(frame) <= len(group) and kept in (0, width)
    into = bytearray(len(group))
    unpack_group(frame, kept, memoryview(into), "f")
    assert into == group


def test_a_compressed_checkpoint_is_smaller_and_the_same(tmp_path: Path) -> None:
    plain, packed = saved(tmp_path / "plain"), saved(tmp_path / "packed", compress=True)
    assert [o.root for o in packed.objects] == [o.root for o in plain.objects]
    (stored,) = packed.objects
    assert stored.packed is not None and stored.file_bytes < 0.95 * stored.nbytes
    assert (tmp_path / "packed" / FILE).stat().st_size == stored.file_bytes
    assert Manifest.read(packed.write()).objects == packed.objects
    into = {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for k, v in state().items()}
    ckptd.load(str(tmp_path / "packed"), into)
    for name, value in state().items():
        assert torch.equal(into[name], value) if isinstance(value, torch.Tensor) else into[name] == value
    with ckptd.open(str(tmp_path / "packed")) as checkpoint:
        assert checkpoint.verify() == []
        for rows in (slice(0, 1), slice(250, 520), slice(699, 700)):
            assert torch.equal(checkpoint["w"][rows, 3:900], state()["w"][rows, 3:900])


def test_a_range_reads_only_the_frames_that_it_touches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, compress=True)
    checkpoint = ckptd.open(str(tmp_path))
    checkpoint.opened(0)
    read: list[int] = []
    unpack = compression.UnpackingReader._unpack

    def counted(self: compression.UnpackingReader, number: int, into: memoryview) -> None:
        read.append(number)
        unpack(self, number, into)

    monkeypatch.setattr(compression.UnpackingReader, "_unpack", counted)
    checkpoint["w"][300:301]  # 4 KiB of 2.8 MB
    assert len(read) == 1
    read.clear()
    checkpoint.verify()
    assert sorted(set(read)) == list(range(-(-checkpoint.manifest.objects[0].nbytes // GROUP_BYTES)))


def test_widths_are_those_of_most_bytes() -> None:
    specs = [
        TensorSpec("a", "F32", (GROUP_BYTES // 4 * 2 + 100,)),
        TensorSpec("b", "BF16", (GROUP_BYTES,)),
        TensorSpec("c", "F64", (3,)),
        TensorSpec("e", "F64", (0,)),
    ]
    plan = ImagePlan.build(specs, objects_capacity=0)
    assert compression.widths_of(plan) == [4, 4, 2, 2, 2]


def test_parts_travel_with_their_packing() -> None:
    part = Part(0, FILE, 10, bytes(16), (), Packed(7, bytes(range(16))))
    assert Part.read(part.write()) == part
    assert Part.read(replace(part, packed=None).write()).packed is None


def zstd(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def streamed(data: bytes) -> bytes:
    """A frame that does not declare its size."""
    stream = zstandard.ZstdCompressor().compressobj()
    return stream.compress(data) + stream.flush()


def lying(frame: bytes, declared: int) -> bytes:
    """The frame with another declared size, which takes 4 bytes behind the head and perhaps a window."""
    assert frame[4] >> 6 == 2
    at = 5 if frame[4] & 0x20 else 6
    return frame[:at] + struct.pack("<I", declared) + frame[at + 4 :]


def wide_window(data: bytes) -> bytes:
    """A frame that declares its size, and asks for a window of 128 MiB to decompress it."""
    parameters = zstandard.ZstdCompressionParameters(window_log=27, compression_level=1)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=len(data))
    frame = bytearray(stream.compress(data) + stream.flush())
    if frame[4] & 0x20:  # it is written without a window: give it one
        single, size = frame[4], frame[5 : 5 + (1 << (frame[4] >> 6))]
        assert len(size) == 4
        frame[4:9] = bytes([single & ~0x20, (27 - 10) << 3]) + size
    return bytes(frame)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "bomb that declares its size": lambda: zstd(bytes(BOMB_BYTES)),
    "bomb that declares none": lambda: streamed(bytes(BOMB_BYTES)),
    "bomb that lies": lambda: lying(zstd(bytes(BOMB_BYTES)), 100_000),
    "short one that lies": lambda: lying(zstd(bytes(99_999)), 100_000),
    "one byte more": lambda: lying(zstd(bytes(100_001)), 100_000),
    "declares almost 2**64": lambda: (
        struct.pack("<IBBQ", 0xFD2FB528, 0xC0, 0x50, 2**64 - 3) + zstd(bytes(9))[5:]
    ),
    "needs a dictionary": lambda: zstd(NOISE, dict_data=zstandard.ZstdCompressionDict(NOISE, 1)),
    "truncated": lambda: zstd(np.random.default_rng(0).bytes(100_000))[:-100],
    "two frames": lambda: zstd(bytes(100_000)) + zstd(bytes(BOMB_BYTES)),
    "bytes behind": lambda: zstd(bytes(100_000)) + b"x",
    "a skippable frame": lambda: struct.pack("<II", 0x184D2A50, 4) + b"abcd",
    "nothing": lambda: b"",
    "no frame": lambda: b"no frame at all, but some bytes",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_frames_are_refused_within_the_budget(kind: str) -> None:
    frame = HOSTILE[kind]()
    into = memoryview(bytearray(100_000))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpoint, match="cannot be decompressed"):
            unpack_group(frame, 1, into, "f")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    # What zstd takes itself, Python does not trace.
    decompressor = vars(compression._local).get("decompressor")
    assert decompressor is None or decompressor.memory_size() < 4 << 20


def test_a_wide_window_takes_no_memory() -> None:
    into = memoryview(bytearray(b"x" * 100_000))
    vars(compression._local).clear()
    unpack_group(wide_window(bytes(100_000)), 1, into, "f")
    assert not any(into)
    assert compression._local.decompressor.memory_size() < 4 << 20


def test_a_frame_of_the_right_length_is_accepted() -> None:
    into = memoryview(bytearray(b"x" * 100_000))
    unpack_group(zstd(bytes(100_000)), 1, into, "f")
    assert not any(into)


class _Bytes(Reader):
    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def read_into(self, start: int, into: memoryview) -> None:
        into[:] = self.data[start : start + len(into)]

    def close(self) -> None:
        pass


def table(
    rows: list[tuple[int, int]], *, file_bytes: int, version: int = 1, group: int = GROUP_BYTES
) -> bytes:
    head = struct.pack("<8sIIQQ", b"ckptdfrm", version, group, file_bytes, len(rows))
    return head + b"".join(struct.pack("<IB3x", *row) for row in rows)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (table([(100, 4)], file_bytes=999, version=2), "begins with"),
        (table([(100, 4)], file_bytes=998), "begins with"),
        (table([(100, 4)], file_bytes=999, group=4096), "begins with"),
        (table([(100, 3)], file_bytes=999), "width"),
        (table([(100, 16)], file_bytes=999), "width"),
        (table([(99, 4)], file_bytes=999), "make 99 bytes"),
        (table([(0, 4)], file_bytes=999), "make 0 bytes"),
        (table([(2**32 - 1, 4)], file_bytes=999), "make 4294967295 bytes"),
        (table([(100, 4)], file_bytes=999)[:-1] + b"\1", "width"),
        (table([(50, 4), (50, 4)], file_bytes=999), "match"),
        (table([(100, 4)], file_bytes=999)[:-1], "match"),  # truncated
        (table([(100, 4)], file_bytes=999)[:20], "match"),
        (b"", "match"),
        (table([(GROUP_BYTES, 4)], file_bytes=999), "make 1048576 bytes"),  # beyond the file
    ],
)
def test_lying_tables_are_refused(made: bytes, why: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=why):
        compression.read_frames("f", made, 999, Packed(100, xxh3_128_digest(made)))
    good = table([(100, 4)], file_bytes=999)
    with pytest.raises(CorruptCheckpoint, match="match the manifest"):
        compression.read_frames("f", good, 999, Packed(100, bytes(16)))
    assert len(compression.read_frames("f", good, 999, Packed(100, xxh3_128_digest(good)))) == 1


@pytest.mark.parametrize("lengths", [(GROUP_BYTES + 1, 9), (0, 100)])
def test_lengths_that_no_group_has_are_refused_though_their_sum_is_right(lengths: tuple[int, int]) -> None:
    made = table([(length, 4) for length in lengths], file_bytes=GROUP_BYTES + 9)
    with pytest.raises(CorruptCheckpoint, match="make"):
        packed = Packed(sum(lengths), xxh3_128_digest(made))
        compression.read_frames("f", made, GROUP_BYTES + 9, packed)


def test_readers_do_not_read_beyond_the_end() -> None:
    data = b"a" * (GROUP_BYTES + 10)
    packing = compression.Packing([data[:77], data[77:]], [1, 1])
    packed = b"".join(packing)
    made = packing.table()
    frames = compression.read_frames("f", made, len(data), Packed(len(packed), xxh3_128_digest(made)))
    reader = compression.UnpackingReader(_Bytes(packed), frames, len(data), "f")
    into = bytearray(20)
    reader.read_into(GROUP_BYTES - 10, memoryview(into))
    assert into == b"a" * 20
    with pytest.raises(CorruptCheckpoint, match="ends at byte"):
        reader.read_into(GROUP_BYTES - 9, memoryview(into))


def test_no_group_lies_beyond_the_file(tmp_path: Path) -> None:
    """The table says so, and manifest and digests agree with it; the file is as long as it says."""
    manifest = saved(tmp_path, compress=True)
    (stored,) = manifest.objects
    assert stored.packed is not None
    store = LocalStore(tmp_path)
    made = bytearray(store.read(FILE + ".frames", 1 << 20))
    lengths = [length for length, _ in struct.iter_unpack("<IB3x", made[32:])]
    first, second = 0, next(i for i, length in enumerate(lengths) if i and length < lengths[0])
    for at, length in ((first, lengths[first] + 1), (second, lengths[second] - 1)):  # the same sum
        struct.pack_into("<I", made, 32 + 8 * at, length)
    store.put(FILE + ".frames", [bytes(made)])
    packed = Packed(stored.packed.nbytes, xxh3_128_digest(bytes(made)))
    store.delete("manifest.json")
    store.put_if_absent("manifest.json", replace(manifest, objects=(replace(stored, packed=packed),)).write())
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.verify()
    with pytest.raises(CorruptCheckpoint):
        checkpoint["w"][...]


@pytest.mark.parametrize("kind", ["flipped", "truncated", "longer", "table flipped", "table gone"])
def test_damage_is_found_by_every_reader(tmp_path: Path, kind: str) -> None:
    saved(tmp_path, compress=True)
    path = tmp_path / (FILE if "table" not in kind else FILE + ".frames")
    data = bytearray(path.read_bytes())
    if "flipped" in kind:
        data[len(data) // 2] ^= 4
    path.unlink()
    if kind != "table gone":
        cut = {"truncated": data[:-1], "longer": data + b"x"}
        path.write_bytes(cut.get(kind, data))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.verify()
    with pytest.raises(CorruptCheckpoint):
        for name in checkpoint:
            checkpoint[name][...]


def test_frames_that_hold_other_bytes_fail_their_digests(tmp_path: Path) -> None:
    """Frames and table agree, and the manifest is theirs; but the bytes are others: the digests say so."""
    manifest = saved(tmp_path, compress=True)
    (stored,) = manifest.objects
    other = np.random.default_rng(3).bytes(stored.nbytes)
    packing = compression.Packing([other], [4] * (-(-stored.nbytes // GROUP_BYTES)))
    store = LocalStore(tmp_path)
    store.put(FILE, packing)
    store.put(FILE + ".frames", [packing.table()])
    packed = Packed(packing.nbytes, xxh3_128_digest(packing.table()))
    store.delete("manifest.json")
    store.put_if_absent("manifest.json", replace(manifest, objects=(replace(stored, packed=packed),)).write())
    with pytest.raises(CorruptCheckpoint, match="do not match their digest"):
        open_checkpoint(str(tmp_path))["w"][...]
