"""Many parts become one table of tensors: replicas are found, proved equal, and become covers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ckptd.errors import StateMismatch
from ckptd.image.fields import MalformedField
from ckptd.image.manifest import StoredTensor
from ckptd.image.tile_classes import TileClass
from ckptd.layout.fingerprint import add
from ckptd.layout.tiles import Tiles
from ckptd.storage.parts import LocalTensor, Part

Held = tuple[int, LocalTensor]  # place (index of the object, or rank), and what lies there
_OF_RANK: Final = re.compile(r"@[0-9]+$")


@dataclass(frozen=True)
class Table:
    """The tensors of a checkpoint, as a manifest holds them."""

    tensors: tuple[StoredTensor, ...]
    classes: tuple[TileClass, ...]
    fingerprints: dict[str, int]  # of the tensors whose replicas are equal and whose boxes all have one


def table(parts: Sequence[Part]) -> Table:
    """Returns the table of these parts; places are their indices.

    Tensors that are equal in place and digest on several ranks are replicas.  Those that are equal in place
    alone are kept as they are, and marked (`differs`); where even the form differs, a rank's own is named
    `NAME@RANK`.

    Raises:
        StateMismatch: the boxes of a tensor overlap, or leave a part of it out.
    """
    tensors: list[StoredTensor] = []
    classes: dict[Any, int] = {}
    kept: list[TileClass] = []
    marks: dict[str, int] = {}
    for name, held in _by_name(parts).items():
        tiles, differs, mark = _tiles(held)
        if mark is not None and not differs:
            marks[name] = mark
        made = TileClass.from_tiles(name, tiles)
        number = classes.setdefault(made.key(), len(kept))
        first = held[0][1]
        if number == len(kept):
            kept.append(made)
        try:
            kept[number].check(name, first.shape)
        except MalformedField as error:
            raise StateMismatch(
                "this state is not whole",
                str(error),
                "save from all ranks that hold it, each its own part",
            ) from error
        tensors.append(StoredTensor(name, first.dtype, first.shape, number, differs))
    return Table(tuple(tensors), tuple(kept), marks)


def writers(tables: Sequence[Sequence[LocalTensor]]) -> list[set[str]]:
    """Returns, for every rank, the names of the tensors that it writes: each replica once, in equal
    shares of bytes.  Of a tensor that differs between ranks each writes its own.

    Deterministic: every rank computes the same.
    """
    load = [0] * len(tables)
    chosen: list[set[str]] = [set() for _ in tables]
    written: list[set[str]] = [set() for _ in tables]  # arrays; one may have several names
    groups: dict[tuple[Any, ...], list[tuple[int, LocalTensor]]] = {}
    for rank, tensors in enumerate(tables):
        for tensor in tensors:
            key = (tensor.name, tensor.dtype, tensor.shape, tensor.key())
            groups.setdefault(key, []).append((rank, tensor))

    def write(rank: int, tensor: LocalTensor) -> None:
        if tensor.array not in written[rank]:
            load[rank] += tensor.nbytes
        written[rank].add(tensor.array)
        chosen[rank].add(tensor.name)

    # Large ones first, so that small ones even out what is left.
    for key in sorted(groups, key=lambda k: (-groups[k][0][1].nbytes, k[0], k[3])):
        held = groups[key]
        if len({tensor.digest for _, tensor in held}) > 1:
            for rank, tensor in held:
                write(rank, tensor)
        else:
            write(*min(held, key=lambda h: (h[1].array not in written[h[0]], load[h[0]], h[0])))
    return chosen


def own_name(name: str, rank: int) -> str:
    """Returns what a rank's tensor is called that has another shape or dtype than the first one."""
    return f"{name}@{rank}"


def common_name(name: str) -> str:
    """Returns what the first one of a rank's own tensor is called (`own_name`); of any other, its name."""
    return _OF_RANK.sub("", name)


def _by_name(parts: Sequence[Part]) -> dict[str, list[Held]]:
    found: dict[str, list[Held]] = {}
    for index, part in enumerate(parts):
        for tensor in part.tensors:
            name = tensor.name
            first = found[name][0][1] if name in found else tensor
            if (first.dtype, first.shape) != (tensor.dtype, tensor.shape):
                name = own_name(name, part.rank)
            found.setdefault(name, []).append((index, tensor))
    return found


def _tiles(held: list[Held]) -> tuple[Tiles, bool, int | None]:
    """All boxes of one tensor with their covers, whether these differ, and the first one's fingerprint."""
    groups: dict[bytes, list[Held]] = {}
    for place, tensor in held:
        if len(tensor.start):
            groups.setdefault(tensor.key(), []).append((place, tensor))
    differs = any(len({t.digest for _, t in group}) > 1 for group in groups.values())
    covers = min(map(len, groups.values()), default=0)
    chosen = [(cover, *group[cover]) for group in groups.values() for cover in range(covers)]
    arrays = list(dict.fromkeys(tensor.array for _, _, tensor in chosen)) or [held[0][1].array]
    d = len(held[0][1].shape)
    rows = [len(tensor.start) for _, _, tensor in chosen]

    def repeated(values: list[int]) -> Any:
        return np.repeat(np.array(values, np.int64), rows)

    def stacked(field: str) -> Any:
        empty = np.zeros((0, d) if field != "start" else 0, np.int64)
        return np.concatenate([empty, *(getattr(tensor, field) for _, _, tensor in chosen)])

    tiles = Tiles(
        held[0][1].shape,
        stacked("offsets"),
        stacked("sizes"),
        repeated([place for _, place, _ in chosen]),
        repeated([arrays.index(tensor.array) for _, _, tensor in chosen]),
        stacked("start"),
        stacked("strides"),
        repeated([cover for cover, _, _ in chosen]),
        tuple(arrays),
    )
    marks = [tensor.fingerprint for cover, _, tensor in chosen if cover == 0]
    known = [mark for mark in marks if mark is not None]
    return tiles, differs, add(known) if len(known) == len(marks) else None
