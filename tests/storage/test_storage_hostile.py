"""Damage and lies: a typed error each, soon, and no target touched by what was not verified."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from storagekit import arrays, forge, write_split

from ckptd.errors import CkptdError, CorruptCheckpoint, InvalidRequest, NotFound
from ckptd.image import ImagePlan, TensorSpec, Variable, write_variable
from ckptd.image.manifest import Manifest, StoredLayout, StoredObject, StoredTensor
from ckptd.layout import placements
from ckptd.layout.placements import Replicate, Shard
from ckptd.layout.tiles import Tiles
from ckptd.storage import place
from ckptd.storage.reading import Checkpoint, open_checkpoint
from ckptd.storage.transfer import Job


def refuses(directory: Path, kind: type[CkptdError] = CorruptCheckpoint, name: str = "a") -> CkptdError:
    """Opening, or reading a tensor, raises; within a second, and the target keeps its values."""
    begin = time.perf_counter()
    held = np.full(4, -1, "<i4")
    with pytest.raises(kind) as caught:
        checkpoint = open_checkpoint(str(directory))
        job = Job(checkpoint)
        shape = checkpoint.tensor(name).shape
        job.want(name, placements.tiles(shape, (1,), [Replicate()], name), {name: held})
        job.run()
    print(f"{caught.value} ({time.perf_counter() - begin:.2f} s)")
    assert (held == -1).all()
    assert caught.value.why and caught.value.next
    return caught.value


def image(values: bytes = bytes(16)) -> bytearray:
    plan = ImagePlan.build([TensorSpec("a", "I32", (4,))], objects_capacity=0)
    made = bytearray(plan.image_bytes)
    view = memoryview(made)
    plan.lay_out(view)
    plan.tensor(view, "a")[:] = values
    write_variable(plan, view, Variable("job", 0, 3, 0, 1, b""))
    return made


def test_the_forger_makes_what_can_be_read(tmp_path: Path) -> None:
    forge(tmp_path, bytes(image(struct.pack("<4i", 1, 2, 3, 4))))
    assert open_checkpoint(str(tmp_path))["a"][...].tolist() == [1, 2, 3, 4]


def test_a_truncated_and_a_longer_file(tmp_path: Path) -> None:
    forge(tmp_path, bytes(image()))
    file = tmp_path / place.object_name(0)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert "truncated" in str(refuses(tmp_path))
    file.write_bytes(whole + b"\0")
    assert "too long" in str(refuses(tmp_path))
    file.unlink()
    assert "gone" in str(refuses(tmp_path))


def test_an_offset_beyond_the_file(tmp_path: Path) -> None:
    forge(tmp_path, bytes(image()), shape=(5,))  # the manifest wants more than the array has
    assert "up to byte 20" in str(refuses(tmp_path))


def test_a_header_whose_offsets_lead_beyond_the_file(tmp_path: Path) -> None:
    made = bytes(image()).replace(b'"data_offsets":[0,16]', b'"data_offsets":[0,96]')
    forge(tmp_path, made)
    refuses(tmp_path)


def test_a_header_length_beyond_the_file(tmp_path: Path) -> None:
    made = image()
    made[:8] = (1 << 62).to_bytes(8, "little")
    forge(tmp_path, bytes(made))
    refuses(tmp_path)


def test_a_header_of_500_000_tensors_of_no_size(tmp_path: Path) -> None:
    entries = ",".join(f'"t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(500_000))
    text = ('{"__metadata__":{"format":"pt","ckptd":"image/1"},' + entries + "}").encode()
    total = -(-(8 + len(text)) // 4096) * 4096
    forge(tmp_path, (total - 8).to_bytes(8, "little") + text.ljust(total - 8))
    assert "500000 entries" in str(refuses(tmp_path))


def test_a_foreign_dtype_in_a_header(tmp_path: Path) -> None:
    forge(tmp_path, bytes(image()).replace(b'"I32"', b'"Q32"'))
    assert "unknown dtype" in str(refuses(tmp_path))
    forge(tmp_path / "other", bytes(image()), dtype="F32")
    assert "is I32" in str(refuses(tmp_path / "other"))


def test_a_file_of_another_checkpoint(tmp_path: Path) -> None:
    made = image()
    plan = ImagePlan.parse(memoryview(made))
    write_variable(plan, memoryview(made), Variable("job", 0, 4, 0, 1, b""))
    forge(tmp_path, bytes(made))
    with pytest.raises(CorruptCheckpoint, match="belongs to another checkpoint"):
        open_checkpoint(str(tmp_path)).objects()


def test_a_damaged_manifest_or_none(tmp_path: Path) -> None:
    forge(tmp_path, bytes(image()))
    manifest = tmp_path / "manifest.json"
    good = manifest.read_bytes()
    manifest.write_bytes(good.replace(b'"step":3', b'"step":4'))
    assert "digest at its end" in str(refuses(tmp_path))
    manifest.write_bytes(good[:-40])
    refuses(tmp_path)
    twice = json.dumps({"ckptd.manifest": 1})[:-1] + ',"step":1,"step":2}'
    manifest.write_text(twice)
    assert "given twice" in str(refuses(tmp_path))
    manifest.unlink()
    refuses(tmp_path, NotFound)


def test_one_flipped_byte_anywhere_is_found_and_never_loaded(tmp_path: Path) -> None:
    seed = 21
    state = arrays(seed)
    write_split(tmp_path, state, (2,), (Shard(0),))
    generator = np.random.default_rng(seed)
    files = [tmp_path / place.object_name(rank) for rank in range(2)]
    for _ in range(25):
        file = files[int(generator.integers(2))]
        data = bytearray(file.read_bytes())
        at, bit = int(generator.integers(len(data))), 1 << int(generator.integers(8))
        data[at] ^= bit
        file.write_bytes(data)
        checkpoint = open_checkpoint(str(tmp_path))
        (damage,) = checkpoint.verify()
        assert damage.object == file.name and damage.begin <= at < damage.end
        for name, whole in state.items():
            try:
                found = checkpoint[name][...]
            except CorruptCheckpoint:
                continue
            assert found.tobytes() == whole.tobytes(), f"seed {seed}: byte {at} of {file.name}"
        data[at] ^= bit
        file.write_bytes(data)
    assert open_checkpoint(str(tmp_path)).verify() == []


def test_a_damaged_table_is_found(tmp_path: Path) -> None:
    write_split(tmp_path, arrays(22), (2,), (Shard(0),))
    table = tmp_path / (place.object_name(1) + ".digests")
    data = bytearray(table.read_bytes())
    data[-1] ^= 1
    table.write_bytes(data)
    progress: list[tuple[int, int]] = []
    (damage,) = open_checkpoint(str(tmp_path)).verify(lambda done, total: progress.append((done, total)))
    assert damage.object == place.object_name(1) and "root" in damage.why
    assert progress and progress[-1][0] <= progress[-1][1]


def test_two_elements_in_one_place_are_refused(tmp_path: Path) -> None:
    zero, one = np.zeros((1, 2), np.int64), np.zeros(1, np.int64)
    lying = Tiles((2, 2), zero, zero + 2, one, one, one, zero + 1, one, ("a",))
    forge(tmp_path, bytes(image()), shape=(2, 2), tiles=lying)
    assert "in one place" in str(refuses(tmp_path))


@pytest.mark.parametrize(
    "url", ["", "ckptd://", "ckptd://job", "ckptd://job/../x", "ckptd://../step-1", "ckptd://job/step-1/x",
            "ckptd://job/step-x", "ckptd://a b/step-1", "nosuchscheme://x"],
)  # fmt: skip
def test_urls_that_name_no_place(url: str) -> None:
    with pytest.raises(InvalidRequest):
        open_checkpoint(url)


def test_checkpoint_closes_and_reads_again(tmp_path: Path) -> None:
    forge(tmp_path, bytes(image()))
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        checkpoint["a"][...]
    assert checkpoint["a"][1:2].tolist() == [0]


def test_a_layout_that_places_tensors_on_parts_that_are_not_there_is_refused(tmp_path: Path) -> None:
    manifest = Manifest(
        "job",
        0,
        1,
        "consolidated",
        1,
        (StoredObject("part", 1, bytes(16), 7),),  # the only one, and not the first
        (StoredTensor("a", "I32", (4,)),),
        mesh=(("dp", 1),),
        layout=StoredLayout("x", "layout x() {\n mesh dp\n a : [4]\n}", {}),
    )
    (tmp_path / "manifest.json").write_bytes(manifest.write())
    refuses(tmp_path)
