"""Placements against torch's own functions: where its shards begin, what is in them, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod

import numpy as np
import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_common import _chunk_with_empty
from torch.distributed.tensor import _utils as torch_utils
from torch.distributed.tensor.placement_types import Replicate as TorchReplicate
from torch.distributed.tensor.placement_types import Shard as TorchShard
from torch.distributed.tensor.placement_types import _StridedShard as TorchStrided

from ckptd.layout import boxes, placements
from ckptd.layout.placements import Placement, Replicate, Shard, Strided
from ckptd.layout.tiles import Tiles


def of_torch(placement: Placement) -> TorchShard | TorchStrided | TorchReplicate:
    if isinstance(placement, Shard):
        return TorchShard(placement.dim)
    if isinstance(placement, Strided):
        return TorchStrided(placement.dim, split_factor=placement.split_factor)
    return TorchReplicate()


def sharded_by_torch(
    whole: torch.Tensor, mesh_shape: Sequence[int], coordinate: Sequence[int], chosen: Sequence[Placement]
) -> torch.Tensor:
    """What torch's own splitting leaves at this coordinate; it is what `distribute_tensor` scatters."""
    local = whole
    for size, at, placement in zip(mesh_shape, coordinate, chosen, strict=True):
        if not isinstance(placement, Replicate):
            pieces, _ = of_torch(placement)._split_tensor(local, size, with_padding=False, contiguous=True)
            local = pieces[at]
    return local


def held(tiles: Tiles, place: int, size: int) -> np.ndarray:
    """The flat logical index of each element that a place stores, in the order in which it stores them."""
    found = np.full(size, -1)
    logical = boxes.row_major(tiles.shape)
    mine = tiles.at(tiles.place == place)
    for i in range(len(mine)):
        for index in itertools.product(*map(range, mine.sizes[i].tolist())):
            at = int(mine.start[i] + sum(x * s for x, s in zip(index, mine.strides[i].tolist(), strict=True)))
            assert found[at] == -1
            found[at] = sum(
                (x + o) * s for x, o, s in zip(index, mine.offsets[i].tolist(), logical, strict=True)
            )
    return found


def compare(shape: tuple[int, ...], mesh_shape: tuple[int, ...], chosen: Sequence[Placement]) -> int:
    """All ranks of one DTensor; returns how many were compared."""
    tiles = placements.tiles(shape, mesh_shape, chosen, "w")
    assert (tiles.sizes > 0).all() and (tiles.array == 0).all()
    copies = [n for n, p in zip(mesh_shape, chosen, strict=True) if isinstance(p, Replicate)]
    if prod(shape):
        assert set(tiles.cover.tolist()) == set(range(prod(copies)))
        assert boxes.fault(shape, tiles.offsets, tiles.sizes, tiles.cover) is None
    else:
        assert len(tiles) == 0
    whole = torch.arange(prod(shape)).reshape(shape)
    for rank, coordinate in enumerate(itertools.product(*map(range, mesh_shape))):
        expected = sharded_by_torch(whole, mesh_shape, coordinate, chosen)
        local, offset = torch_utils._compute_local_shape_and_global_offset(
            shape, mesh_shape, list(coordinate), [of_torch(p) for p in chosen]
        )
        assert tuple(expected.shape) == local == placements.local_shape(shape, mesh_shape, chosen, coordinate)
        assert np.array_equal(held(tiles, rank, prod(local)), expected.flatten().numpy())
        if prod(local):
            mine = tiles.at((tiles.place == rank) & (tiles.start == 0))
            assert tuple(mine.offsets[0].tolist()) == offset
    return prod(mesh_shape)


SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (16,), (0, 3), (5, 6), (8, 3), (9, 1, 4), (3, 10, 2)]
MESHES = [(1,), (2,), (5,), (8,), (2, 2), (3, 2), (2, 4), (4, 3), (2, 2, 3)]


def choices(shape: tuple[int, ...]) -> list[Placement]:
    found: list[Placement] = [Replicate()]
    for dim in range(len(shape)):
        found += [Shard(dim), Strided(dim, 2), Strided(dim, 3)]
    return found


def test_every_rank_holds_what_torch_gives_it_in_torchs_order() -> None:
    random = np.random.default_rng(4)
    tensors = ranks = 0
    for shape in SHAPES:
        for mesh_shape in MESHES:
            every = list(itertools.product(choices(shape), repeat=len(mesh_shape)))
            for i in random.permutation(len(every))[:14]:
                ranks += compare(shape, mesh_shape, every[i])
                tensors += 1
    print(f"{tensors:,} sharded tensors, {ranks:,} shards equal torch's (seed 4)")


def test_what_fully_shard_stores_over_tensor_parallel_is_each_ranks_own_rows_split() -> None:
    """torch writes it as [_StridedShard(0, sf=tp), Shard(0)]; for some uneven sizes that differs."""
    cases = unlike = 0
    for rows, dp, tp in itertools.product(range(33), range(1, 5), range(1, 5)):
        chosen, mesh = [Strided(0, tp), Shard(0)], (dp, tp)
        tiles = placements.tiles((rows, 2), mesh, chosen, "w", fully_shard=True)
        whole = torch.arange(rows * 2).reshape(rows, 2)
        stored, written = [], []
        for rank, coordinate in enumerate(itertools.product(range(dp), range(tp))):
            own, _ = TorchShard(0)._split_tensor(whole, tp, with_padding=False)
            mine = _chunk_with_empty(own[coordinate[1]], dp, dim=0)[coordinate[0]]  # as FSDPParam does
            assert np.array_equal(held(tiles, rank, mine.numel()), mine.flatten().numpy())
            shape = placements.local_shape((rows, 2), mesh, chosen, coordinate, fully_shard=True)
            assert shape == tuple(mine.shape) or mine.numel() == prod(shape) == 0
            stored.append(mine.flatten().tolist())
            written.append(sharded_by_torch(whole, mesh, coordinate, chosen).flatten().tolist())
        cases += 1
        unlike += stored != written
        assert (stored == written) == ([*map(len, stored)] == [*map(len, written)])  # sizes tell them apart
        assert stored == written or rows % (dp * tp)
    assert unlike
    print(
        f"{cases:,} meshes and sizes, in {unlike} of them torch's placements are not what fully_shard stores"
    )


def test_fully_shard_over_two_splits_comes_after_both() -> None:
    chosen = [Replicate(), Strided(0, 6), Shard(0), Shard(0)]
    tiles = placements.tiles((13,), (2, 2, 2, 3), chosen, "w", fully_shard=True)
    assert boxes.fault(tiles.shape, tiles.offsets, tiles.sizes, tiles.cover) is None
    # 13 rows: 7 and 6; 3, 3, 1 and 2, 2, 2; then halves of those.
    assert tiles.sizes[tiles.cover == 0, 0].tolist() == [2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    nested = placements.tiles(
        (23,), (2, 2, 2), [Strided(0, 4), Strided(0, 2), Shard(0)], "w", fully_shard=True
    )
    for rank, coordinate in enumerate(itertools.product(range(2), repeat=3)):
        share = torch.arange(23)
        for at in reversed(coordinate):
            share = share.chunk(2)[at]
        assert held(nested, rank, len(share)).tolist() == share.tolist()
    with pytest.raises(ValueError, match="is not fully_shard's: 6 ranks"):
        placements.tiles((13,), (2, 2, 2, 3), [chosen[0], Strided(0, 2), *chosen[2:]], "w", fully_shard=True)


def test_what_fully_shard_writes_is_told_from_other_strided_shards() -> None:
    for mesh, chosen, expected in (
        ((3, 2), [Strided(0, 2), Shard(0)], True),
        ((2, 3, 2), [Replicate(), Strided(0, 2), Shard(0)], True),
        ((2, 2, 3), [Strided(0, 6), Shard(0), Shard(0)], True),
        ((3, 2), [Strided(0, 2), Shard(1)], False),  # nothing to its right splits dimension 0
        ((3, 2), [Strided(0, 3), Shard(0)], False),
        ((3, 2), [Shard(0), Shard(0)], False),  # nothing strided: both readings are one
    ):
        assert placements.by_fully_shard(mesh, chosen) is expected, (mesh, chosen)


def test_strided_shards_are_a_few_boxes_and_neighbours_are_one() -> None:
    tiles = placements.tiles((16, 4), (2,), [Strided(0, 4)], "w")
    assert np.bincount(tiles.place).tolist() == [4, 4]
    assert tiles.offsets[tiles.place == 1, 0].tolist() == [2, 6, 10, 14]
    assert tiles.start[tiles.place == 1].tolist() == [0, 8, 16, 24]
    assert len(placements.tiles((16, 4), (2, 2), [Strided(0, 2), Shard(0)], "w")) == 4
    assert len(placements.tiles((16, 4), (1,), [Strided(0, 4)], "w")) == 1


def test_ranks_and_covers_are_the_meshs() -> None:
    table = np.array([[3, 1], [0, 2]])
    tiles = placements.tiles((4, 2), (2, 2), [Replicate(), Shard(0)], "layer.weight", table)
    assert tiles.arrays == ("layer.weight",)
    rows = zip(tiles.place.tolist(), tiles.cover.tolist(), tiles.offsets[:, 0].tolist(), strict=True)
    assert sorted(rows) == [(0, 1, 0), (1, 0, 2), (2, 1, 2), (3, 0, 0)]


def test_sixteen_thousand_ranks_are_tiled_without_a_loop_over_ranks() -> None:
    tiles = placements.tiles((32768, 8192), (2048, 8), [Strided(0, 8), Shard(0)], "w")
    assert len(tiles) == 16384
    assert boxes.fault(tiles.shape, tiles.offsets, tiles.sizes, tiles.cover) is None


@pytest.mark.parametrize(
    ("mesh_shape", "chosen", "ranks", "message"),
    [
        ((2,), [], None, "0 placements for a mesh of 1"),
        ((2,), [Shard(2)], None, "2 dimensions"),
        ((2,), [Shard(-1)], None, "count from 0"),
        ((2,), [Strided(0, 0)], None, "at least 1"),
        ((0,), [Shard(0)], None, "impossible size"),
        ((2,), [Shard(0)], np.zeros(3), "ranks of shape"),
    ],
)
def test_placements_that_do_not_fit_are_refused(
    mesh_shape: tuple[int, ...], chosen: list[Placement], ranks: np.ndarray | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        placements.tiles((4, 4), mesh_shape, chosen, "w", ranks)
