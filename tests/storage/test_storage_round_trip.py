"""What is written in one tiling is read in any other, and only the blocks that are needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from storagekit import CODES, arrays, local, split_of, write_split

from ckptd.errors import NotFound, StateMismatch
from ckptd.layout import placements
from ckptd.layout.placements import Placement, Replicate, Shard, Strided
from ckptd.storage import writing
from ckptd.storage.parts import LocalTensor
from ckptd.storage.reading import open_checkpoint
from ckptd.storage.transfer import Job

SPLITS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "one": ((1,), (Replicate(),)),
    "rows": ((3,), (Shard(0),)),
    "columns": ((4,), (Shard(1),)),
    "hsdp": ((2, 2), (Replicate(), Shard(0))),
    "both": ((2, 3), (Shard(0), Shard(1))),
    "strided": ((2, 2), (Strided(0, 2), Shard(0))),
    "deep": ((5,), (Shard(2),)),
}


@pytest.mark.parametrize("stored", SPLITS)
def test_any_tiling_loads_into_any_other(tmp_path: Path, stored: str) -> None:
    state = arrays(seed=11)
    write_split(tmp_path, state, *SPLITS[stored])
    checkpoint = open_checkpoint(str(tmp_path))
    assert sorted(checkpoint.names) == sorted(state)
    for mesh, split in SPLITS.values():
        for rank in range(int(np.prod(mesh))):
            job = Job(checkpoint)
            expected, found = {}, {}
            for name, whole in state.items():
                kinds = split_of(whole.ndim, split)
                tiles = placements.tiles(whole.shape, mesh, kinds, name)
                at = tuple(int(c) for c in np.unravel_index(rank, mesh))
                shape = placements.local_shape(whole.shape, mesh, kinds, at)
                expected[name] = local(tiles, whole, rank, shape)
                found[name] = np.zeros(int(np.prod(shape)), whole.dtype)
                job.want(name, tiles.at(tiles.place == rank), {name: found[name]})
            job.run()
            for name in state:
                assert found[name].tobytes() == expected[name].tobytes(), (stored, split, rank, name)
    assert checkpoint.verify() == []


def test_slices_read_what_they_name(tmp_path: Path) -> None:
    state = arrays(seed=12)
    write_split(tmp_path, state, (3,), (Shard(0),))
    with open_checkpoint(str(tmp_path)) as checkpoint:
        for name, whole in state.items():
            view = checkpoint[name]
            assert (view.shape, view.dtype) == (whole.shape, CODES[whole.dtype.str])
            np.testing.assert_array_equal(view[...], whole)
            if whole.ndim and whole.size:
                np.testing.assert_array_equal(view[-1], whole[-1])
                np.testing.assert_array_equal(view[1:7:2], whole[1:7:2])
                np.testing.assert_array_equal(view[..., 0], whole[..., 0])
                np.testing.assert_array_equal(view[5:2], whole[5:2])
        with pytest.raises(NotFound, match="did you mean scalar"):
            checkpoint["scalr"]
        with pytest.raises(IndexError, match="out of range"):
            checkpoint["t.0"][1000]
        with pytest.raises(TypeError, match="only ints"):
            checkpoint["t.0"][[1, 2]]


def test_only_blocks_that_are_needed_are_read_once(tmp_path: Path) -> None:
    whole = np.arange(4 << 20, dtype="<i4").reshape(2048, 2048)  # 16 MiB, rows of 8 KiB
    store, _, _ = writing.target(str(tmp_path))
    tensor = LocalTensor.whole("w", "I32", whole.shape, "w", bytes(16))
    head = writing.Variable("job", 0, 3, 0, 1, writing.empty_objects())
    part = writing.write_arrays(store, head, [tensor], lambda _: whole.shape, lambda _: whole)
    writing.publish(store, writing.Heading("job", 3), [part])
    checkpoint = open_checkpoint(str(tmp_path))
    rows = placements.tiles(whole.shape, (8,), [Shard(0)], "w")
    columns = placements.tiles(whole.shape, (8,), [Shard(1)], "w")
    for tiles, most in ((rows, 1.1), (columns, 8.2)):
        job = Job(checkpoint)
        held = np.zeros(whole.size // 8, "<i4")
        job.want("w", tiles.at(tiles.place == 5), {"w": held})
        report = job.run()
        assert report.needed_bytes == held.nbytes
        assert report.amplification <= most and report.read_bytes <= part.nbytes
    assert held.reshape(2048, 256).tobytes() == np.ascontiguousarray(whole[:, 5 * 256 : 6 * 256]).tobytes()


def test_replicas_are_covers_only_where_their_bytes_are_equal(tmp_path: Path) -> None:
    state = {"w": np.arange(12, dtype="<i4").reshape(4, 3)}
    parts = write_split(tmp_path / "a", state, (2,), (Replicate(),))
    same = open_checkpoint(str(tmp_path / "a"))
    assert not same["w"].differs and same.tiles("w").cover.tolist() == [0, 1]
    # The second rank's bytes are others: both are kept, and a rank gets its own.
    store, _, _ = writing.target(str(tmp_path / "b"))
    others = []
    for rank in range(2):
        values = state["w"] + 100 * rank
        (tensor,) = parts[rank].tensors
        changed = type(tensor)(
            tensor.name, tensor.dtype, tensor.shape, tensor.array, tensor.offsets, tensor.sizes, tensor.start,
            tensor.strides, bytes([rank] * 16),
        )  # fmt: skip
        head = writing.Variable("job", 0, 3, rank, 2, writing.empty_objects())
        others.append(writing.write_arrays(store, head, [changed], lambda _: (4, 3), lambda _, v=values: v))
    writing.publish(store, writing.Heading("job", 3, world_size=2), others)
    differing = open_checkpoint(str(tmp_path / "b"))
    assert differing["w"].differs
    for rank in (0, 1, 5):
        job, held = Job(differing), np.zeros(12, "<i4")
        tiles = placements.tiles((4, 3), (1,), [Replicate()], "w", ranks=np.array([rank]))
        job.want("w", tiles, {"w": held})
        job.run()
        assert held[0] == (100 if rank == 1 else 0)


def test_parts_that_do_not_make_a_whole_are_refused(tmp_path: Path) -> None:
    parts = write_split(tmp_path, arrays(seed=13), (3,), (Shard(0),), publish=False)
    store, _, _ = writing.target(str(tmp_path))
    with pytest.raises(StateMismatch, match="overlap or leave"):
        writing.publish(store, writing.Heading("job", 3, world_size=3), parts[:2])
    with pytest.raises(NotFound):
        open_checkpoint(str(tmp_path))
