"""Plans: from where a tensor is to where it shall be, as copies between boxes.

A plan is a value: it can be counted, printed and looked at before a byte is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from ckptd.layout import boxes
from ckptd.layout.byte_runs import Blocks, Runs, Summary, blocks, canonical, join, runs, summarise
from ckptd.layout.distinct import numbered
from ckptd.layout.tiles import Tiles

__all__ = [
    "Blocks", "Copies", "Near", "Plan", "Runs", "Summary",
    "blocks", "copies", "execute", "join", "plan", "runs", "summary",
]  # fmt: skip

Ints = NDArray[np.int64]
Near = Callable[[Ints], Ints]  # target places [n] -> the source places [n] that are nearest to them
Flat = Callable[[int, str], NDArray[np.generic]]  # (place, array) -> its elements, 1-D and contiguous


@dataclass(frozen=True)
class Copies:
    """n copies between boxes of one tensor: element x of the box, counted from its corner, moves from
    `source_start + sum(x * source_strides)` to `target_start + sum(x * target_strides)`; all in elements."""

    shape: tuple[int, ...]  # of the logical tensor
    offsets: Ints  # [n, d]: where the box lies in the logical tensor
    sizes: Ints  # [n, d]; no box is empty
    source_place: Ints  # [n]
    source_array: Ints  # [n]
    source_start: Ints  # [n]
    source_strides: Ints  # [n, d]
    target_place: Ints  # [n]
    target_array: Ints  # [n]
    target_start: Ints  # [n]
    target_strides: Ints  # [n, d]
    source_arrays: tuple[str, ...]
    target_arrays: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source_place)

    @property
    def elements(self) -> int:
        return int(np.sum(boxes.volume(self.sizes)))


def copies(source: Tiles, target: Tiles, *, near: Near | None = None) -> Copies:
    """All copies that fill every box of `target`, each element exactly once, from boxes of `source`.

    Each target box is filled from one whole cover of the source: the one that has most of it at the nearest
    place (by default the same), otherwise one that depends on the target's place, so that covers share.
    To plan for one place, pass `target.at(target.place == place)`; the choice is the same.

    Raises:
        ValueError: the tensors' shapes differ, or the source has no whole cover.
    """
    if source.shape != target.shape:
        raise ValueError(f"a tensor of shape {source.shape} cannot fill one of shape {target.shape}")
    labels, _, cover = numbered(source.cover)
    held = np.zeros(len(labels), np.int64)
    np.add.at(held, cover, boxes.volume(source.sizes))
    whole = np.flatnonzero(held == prod(source.shape))
    if len(whole) == 0 and len(target):
        raise ValueError(
            f"no cover of the source holds all {prod(source.shape)} elements of the shape {source.shape}; "
            f"the fullest of {len(labels)} holds {max(held, default=0)}"
        )
    chosen = _chosen_cover(source, cover, whole, target, near)
    i, j = boxes.pairs(*_bounds(target, chosen), *_bounds(source, cover))
    return _joined(source, target, i, j)


def _bounds(tiles: Tiles, key: Ints) -> tuple[Ints, Ints]:
    low = np.column_stack([tiles.offsets, key])
    return low, np.column_stack([tiles.offsets + tiles.sizes, key + 1])


def _chosen_cover(source: Tiles, cover: Ints, whole: Ints, target: Tiles, near: Near | None) -> Ints:
    """[len(target)]: the cover of the source, one of `whole`, from which each target box is filled."""
    if len(whole) < 2:
        return np.full(len(target), whole[0] if len(whole) else 0)
    # The digit sum of the place spreads evenly spaced places over the covers, not only consecutive ones.
    turn, rest = np.zeros(len(target), np.int64), np.abs(target.place)
    while rest.any():
        turn, rest = turn + rest % len(whole), rest // len(whole)
    chosen = whole[turn % len(whole)]
    usable = np.flatnonzero(np.isin(cover, whole))
    places = target.place if near is None else near(target.place)
    i, j = boxes.pairs(*_bounds(target, places), *_bounds(source.at(usable), source.place[usable]))
    if len(i) == 0:
        return chosen
    j = usable[j]
    _, sizes = boxes.intersect(target.offsets[i], target.sizes[i], source.offsets[j], source.sizes[j])
    key, _, at = numbered(i * (int(cover.max()) + 1) + cover[j])
    held = np.zeros(len(key), np.int64)
    np.add.at(held, at.ravel(), boxes.volume(sizes))
    box, label = key // (int(cover.max()) + 1), key % (int(cover.max()) + 1)
    order = np.lexsort((-label, held, box))  # the last of a box is the fullest, and of those the first label
    chosen[box[order]] = label[order]
    return chosen


def _joined(source: Tiles, target: Tiles, i: Ints, j: Ints) -> Copies:
    offsets, sizes = boxes.intersect(target.offsets[i], target.sizes[i], source.offsets[j], source.sizes[j])
    filled = np.zeros(len(target), np.int64)
    np.add.at(filled, i, boxes.volume(sizes))
    if np.any(filled != boxes.volume(target.sizes)):
        box = int(np.flatnonzero(filled != boxes.volume(target.sizes))[0])
        raise ValueError(
            f"the source fills {filled[box]} of {boxes.volume(target.sizes)[box]} elements of the box at "
            f"{tuple(target.offsets[box].tolist())} of size {tuple(target.sizes[box].tolist())}: "
            "its covers do not tile the tensor"
        )
    return Copies(
        source.shape,
        offsets,
        sizes,
        source.place[j],
        source.array[j],
        source.start[j] + np.sum((offsets - source.offsets[j]) * source.strides[j], axis=1),
        source.strides[j],
        target.place[i],
        target.array[i],
        target.start[i] + np.sum((offsets - target.offsets[i]) * target.strides[i], axis=1),
        target.strides[i],
        source.arrays,
        target.arrays,
    )


# --- whole checkpoints --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The copies of many tensors; tensors that are tiled alike share them."""

    classes: tuple[Copies, ...]
    members: Mapping[str, int]  # tensor -> its class
    arrays: Mapping[
        str, tuple[tuple[str, ...], tuple[str, ...]]
    ]  # tensor -> names at the source, at the target

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def copies(self, tensor: str) -> Copies:
        """The copies of one tensor, under the names of its own arrays."""
        source, target = self.arrays[tensor]
        return replace(self.classes[self.members[tensor]], source_arrays=source, target_arrays=target)


def plan(tensors: Iterable[tuple[str, Tiles, Tiles]], *, near: Near | None = None) -> Plan:
    """The plan of many tensors: (name, source, target) each; for one place, give the target's tiles there.

    Tiles that share their arrays, or hold equal ones, are joined once.

    Raises:
        ValueError: as of `copies`, with the tensor's name; a name comes twice.
    """
    made: list[Copies] = []
    members: dict[str, int] = {}
    arrays: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    contents = _Contents()
    classes: dict[tuple[int, int], int] = {}
    for name, source, target in tensors:
        if name in members:
            raise ValueError(f"tensor {name!r} comes twice")
        key = (contents.number(source), contents.number(target))
        if key not in classes:
            try:
                made.append(copies(source, target, near=near))
            except ValueError as error:
                raise ValueError(f"tensor {name!r}: {error}") from None
            classes[key] = len(made) - 1
        members[name] = classes[key]
        arrays[name] = (source.arrays, target.arrays)
    return Plan(tuple(made), members, arrays)


class _Contents:
    """Numbers tiles by their contents; cheaply where they share their arrays."""

    def __init__(self) -> None:
        self._by_identity: dict[tuple[object, ...], int] = {}
        self._by_content: dict[tuple[object, ...], int] = {}
        self._kept: list[Tiles] = []  # so that an id stays that array's

    def number(self, tiles: Tiles) -> int:
        columns = (
            tiles.offsets, tiles.sizes, tiles.place, tiles.array, tiles.start, tiles.strides, tiles.cover,
        )  # fmt: skip
        identity = (tiles.shape, *(id(column) for column in columns))
        if identity not in self._by_identity:
            content = (tiles.shape, *(column.tobytes() for column in columns))
            self._by_identity[identity] = self._by_content.setdefault(content, len(self._by_content))
            self._kept.append(tiles)
        return self._by_identity[identity]


def summary(
    found: Plan | Copies, itemsize: int | Callable[[str], int], block_bytes: int | None = None
) -> Summary:
    """What the plan costs: bytes, copies, runs, and for blocks of a size how much more is read than needed.

    Runs of different tensors are not merged here, and arrays begin at a block's begin; with the real
    offsets of arrays in files, `blocks` says exactly what is read.

    Args:
        itemsize: bytes of an element, of all tensors or by the tensor's name.
    """
    if isinstance(found, Copies):
        size = itemsize if isinstance(itemsize, int) else itemsize("")
        return summarise([(runs(found, size), len(found), 1)], block_bytes)
    times: dict[tuple[int, int], int] = {}
    for name, number in found.members.items():
        key = (number, itemsize if isinstance(itemsize, int) else itemsize(name))
        times[key] = times.get(key, 0) + 1
    parts = [
        (runs(found.classes[number], size), len(found.classes[number]), count)
        for (number, size), count in times.items()
    ]
    return summarise(parts, block_bytes)


# --- in memory ----------------------------------------------------------------------------------------------


def execute(found: Copies, source: Flat, target: Flat) -> None:
    """Moves the elements: whole boxes at a time, from array to array.

    Args:
        source, target: give the flat array of a place, contiguous, of one dtype; each is asked for once per
            (place, array), and the targets' are written.

    Raises:
        ValueError: an array is too short for its boxes, not contiguous, or not of its counterpart's dtype.
    """
    sizes, source_strides, target_strides = canonical(found)
    sources: dict[tuple[int, int], NDArray[np.generic]] = {}
    targets: dict[tuple[int, int], NDArray[np.generic]] = {}
    for i in range(len(found)):
        origin = _array(sources, source, found.source_place, found.source_array, found.source_arrays, i)
        goal = _array(targets, target, found.target_place, found.target_array, found.target_arrays, i)
        if origin.dtype != goal.dtype:
            raise ValueError(f"cannot copy {origin.dtype} to {goal.dtype} elements without a cast")
        shape = tuple(sizes[i].tolist())
        np.copyto(
            _view(goal, int(found.target_start[i]), shape, target_strides[i]),
            _view(origin, int(found.source_start[i]), shape, source_strides[i]),
        )


def _array(
    cache: dict[tuple[int, int], NDArray[np.generic]],
    get: Flat,
    place: Ints,
    array: Ints,
    names: tuple[str, ...],
    i: int,
) -> NDArray[np.generic]:
    key = (int(place[i]), int(array[i]))
    if key not in cache:
        found = get(key[0], names[key[1]])
        if found.ndim != 1 or not found.flags.c_contiguous:
            raise ValueError(f"array {names[key[1]]!r} of place {key[0]} is not flat and contiguous")
        cache[key] = found
    return cache[key]


def _view(
    array: NDArray[np.generic], start: int, shape: tuple[int, ...], strides: Ints
) -> NDArray[np.generic]:
    """A box of a flat array; numpy refuses (ValueError) one that reaches out of it."""
    step = array.itemsize
    return np.ndarray(shape, array.dtype, array, start * step, tuple((strides * step).tolist()))
