"""DTensor placements, as pure values, to tiles: which boxes of a tensor each rank of a device mesh holds.

Semantics are torch 2.13's (`torch.distributed.tensor`): the mesh's dimensions are applied from left to right,
each to what the ones before it left.

One trap of torch 2.13: for some uneven sizes, `fully_shard` does not store what its placements say.  It
splits the rows that tensor parallelism has left, and writes [_StridedShard(0, sf=tp), Shard(0)]; read from
left to right, that gives some ranks other rows: of 7 on a mesh of 3 x 2 it stores row 6 on rank 5, and the
placements say rank 4.  With `fully_shard=True` placements mean what it stores.  Where the two differ, so do
the sizes of some local shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from ckptd.layout import boxes
from ckptd.layout.tiles import Tiles

Ints = NDArray[np.int64]
Pieces = list[tuple[int, int]]  # (global start, length), none empty, in the order in which a rank stores them


@dataclass(frozen=True)
class Shard:
    """Consecutive shares of a tensor dimension, by torch.chunk's rule: the last may be shorter, or empty."""

    dim: int


@dataclass(frozen=True)
class Strided:
    """torch's `_StridedShard`: the dimension in `split_factor` chunks, and of each of them a share."""

    dim: int
    split_factor: int


@dataclass(frozen=True)
class Replicate:
    """Every rank along this mesh dimension holds the same."""


Placement = Shard | Strided | Replicate


def tiles(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[Placement],
    array: str,
    ranks: Ints | None = None,
    *,
    fully_shard: bool = False,
) -> Tiles:
    """The tiles of a DTensor: each rank holds its share as one contiguous row-major array of that name.

    A rank whose share is not one box (strided shards) has several; one whose share is empty has none.
    Replicas are covers, numbered row-major over the replicating mesh dimensions.

    Args:
        ranks: `mesh_shape` of places, as `DeviceMesh.mesh`; by default 0, 1, ... in row-major order.
        fully_shard: strided shards are `fully_shard`'s: shares of what all other splits have left to a rank.

    Raises:
        ValueError: placements do not fit the mesh or the tensor.
    """
    _check(shape, mesh_shape, placements, ranks)
    count, dims = prod(mesh_shape), len(shape)
    coordinates = np.indices(tuple(mesh_shape)).reshape(len(mesh_shape), count)
    cover = np.zeros(count, np.int64)
    for at, size, placement in zip(coordinates, mesh_shape, placements, strict=True):
        if isinstance(placement, Replicate):
            cover = cover * size + at
    rank = np.arange(count)
    offsets, sizes, local = (np.zeros((count, dims), np.int64) for _ in range(3))
    extents = np.ones((count, dims), np.int64)
    for dim in range(dims):
        which, first, number, table, lengths = _dimension(
            shape[dim], _steps(dim, mesh_shape, placements, fully_shard), coordinates
        )
        extents[:, dim] = lengths[which]
        # Every box so far, with each of its rank's pieces of this dimension.
        pieces = number[which[rank]]
        chosen = boxes.spans(first[which[rank]], pieces)
        rank = np.repeat(rank, pieces)
        offsets, sizes, local = (np.repeat(values, pieces, axis=0) for values in (offsets, sizes, local))
        offsets[:, dim], sizes[:, dim], local[:, dim] = table[chosen].T
    strides = np.ones((count, dims), np.int64)
    for dim in reversed(range(dims - 1)):
        strides[:, dim] = strides[:, dim + 1] * extents[:, dim + 1]
    places = np.arange(count) if ranks is None else np.asarray(ranks, np.int64).ravel()
    return Tiles(
        tuple(shape),
        offsets,
        sizes,
        places[rank],
        np.zeros(len(rank), np.int64),
        np.sum(local * strides[rank], axis=1, dtype=np.int64),
        strides[rank],
        cover[rank],
        (array,),
    )


def local_shape(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[Placement],
    coordinate: Sequence[int],
    *,
    fully_shard: bool = False,
) -> tuple[int, ...]:
    """The shape of what the rank at this coordinate of the mesh holds; 0 where its share is empty."""
    _check(shape, mesh_shape, placements, None)
    found = []
    for dim, size in enumerate(shape):
        pieces = _whole(size)
        for axis, ranks, placement in _steps(dim, mesh_shape, placements, fully_shard):
            pieces = _shares(pieces, ranks, placement)[coordinate[axis]]
        found.append(_length(pieces))
    return tuple(found)


def by_fully_shard(mesh_shape: Sequence[int], placements: Sequence[Placement]) -> bool:
    """Whether strided shards are to be read as `fully_shard`'s, the only part of torch that makes them.

    True where there are some, and each one's split factor is the number of ranks to its right that split its
    dimension.  Where the readings differ, what stores by the other one has other local shapes on some rank.
    """
    strided = False
    for axis, placement in enumerate(placements):
        if isinstance(placement, Strided):
            strided = True
            inner = prod(
                ranks
                for ranks, other in zip(mesh_shape[axis + 1 :], placements[axis + 1 :], strict=True)
                if not isinstance(other, Replicate) and other.dim == placement.dim
            )
            if placement.split_factor != inner:
                return False
    return strided


def _check(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement], ranks: Ints | None
) -> None:
    if len(placements) != len(mesh_shape):
        raise ValueError(
            f"{len(placements)} placements for a mesh of {len(mesh_shape)} dimensions; give one for each"
        )
    if any(size < 1 for size in mesh_shape) or any(size < 0 for size in shape):
        raise ValueError(f"a mesh {tuple(mesh_shape)} or a shape {tuple(shape)} with an impossible size")
    if ranks is not None and tuple(np.shape(ranks)) != tuple(mesh_shape):
        raise ValueError(f"ranks of shape {np.shape(ranks)} for a mesh of shape {tuple(mesh_shape)}")
    for placement in placements:
        if isinstance(placement, Replicate):
            continue
        if not 0 <= placement.dim < len(shape):
            raise ValueError(f"{placement} of a tensor with {len(shape)} dimensions; dimensions count from 0")
        if isinstance(placement, Strided) and placement.split_factor < 1:
            raise ValueError(f"{placement}: the split factor is at least 1")


def _steps(
    dim: int, mesh_shape: Sequence[int], placements: Sequence[Placement], fully_shard: bool
) -> list[tuple[int, int, Shard | Strided]]:
    """The splits of one tensor dimension in order: (axis of the mesh, its size, how)."""
    steps: list[tuple[int, int, Shard | Strided]] = []
    later: list[tuple[int, int, Shard | Strided]] = []
    inner = 1  # ranks of the axes to the right that split this dimension
    for axis in reversed(range(len(mesh_shape))):
        placement, ranks = placements[axis], mesh_shape[axis]
        if isinstance(placement, Replicate) or placement.dim != dim:
            continue
        if fully_shard and isinstance(placement, Strided):
            if placement.split_factor != inner:
                raise ValueError(
                    f"{placement} is not fully_shard's: {inner} ranks to its right split the dimension"
                )
            later.append((axis, ranks, Shard(dim)))
        else:
            steps.insert(0, (axis, ranks, placement))
        inner *= ranks
    return steps + later


def _dimension(
    size: int, steps: list[tuple[int, int, Shard | Strided]], coordinates: Ints
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """How one tensor dimension is cut.

    Returns: the share of each rank; of each share its first piece in the table, and its number of pieces; the
    table of pieces [m, 3] (global start, length, local start); the length of each share.
    """
    which = np.zeros(coordinates.shape[1], np.int64)
    shares: list[Pieces] = [_whole(size)]
    for axis, ranks, placement in steps:
        shares = [share for before in shares for share in _shares(before, ranks, placement)]
        which = which * ranks + coordinates[axis]
    lengths = np.array([_length(share) for share in shares], np.int64)
    number = np.array([len(share) for share in shares], np.int64)
    table = []
    for share in shares:
        local = 0
        for start, length in share:
            table.append((start, length, local))
            local += length
    return which, np.cumsum(number) - number, number, np.array(table, np.int64).reshape(-1, 3), lengths


def _whole(size: int) -> Pieces:
    return [(0, size)] if size else []


def _length(pieces: Pieces) -> int:
    return sum(length for _, length in pieces)


def _shares(pieces: Pieces, ranks: int, placement: Shard | Strided) -> list[Pieces]:
    """What each of the ranks along a mesh dimension gets of a share."""
    if isinstance(placement, Shard):
        return _chunks(pieces, ranks)
    split = [_chunks(chunk, ranks) for chunk in _chunks(pieces, placement.split_factor)]
    return [_in_order(piece for chunks in split for piece in chunks[rank]) for rank in range(ranks)]


def _chunks(pieces: Pieces, number: int) -> list[Pieces]:
    """torch.chunk's rule, with empty ones up to the number: ceil(length / number) each, while it lasts."""
    total = _length(pieces)
    chunk = -(-total // number)
    cut: list[Pieces] = [[] for _ in range(number)]
    at = 0
    for start, length in pieces:
        end = at + length
        while at < end:
            index = at // chunk
            taken = min(end, (index + 1) * chunk) - at
            cut[index].append((start, taken))
            start, at = start + taken, at + taken
    return cut


def _in_order(pieces: Iterable[tuple[int, int]]) -> Pieces:
    """The pieces one after another; those that follow each other in the tensor are one."""
    joined: Pieces = []
    for start, length in pieces:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return joined
