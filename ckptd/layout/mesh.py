"""The device mesh: named axes, the fastest first, and other factorisations of the same ranks (folds).

A fold says that some mesh axes, taken together, are also counted by other axes: expert parallelism puts
`etp * ep * edp` over the ranks that dense layers see as `tp * cp * dp`.  Both sides count the same index,
their first axis fastest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from ckptd.errors import LayoutRefused
from ckptd.layout.tiles import Ints


@dataclass(frozen=True)
class Fold:
    """`axes` count the same ranks as the mesh axes `of` do."""

    axes: tuple[tuple[str, int], ...]
    of: tuple[str, ...]


@dataclass(frozen=True)
class Mesh:
    """Ranks 0 .. size - 1 as coordinates on named axes, the fastest axis first.

    Raises: LayoutRefused: an axis named twice or of no size, or a fold that does not count the same ranks.
    """

    axes: tuple[tuple[str, int], ...]
    folds: tuple[Fold, ...] = ()
    _columns: dict[str, Ints] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes] + [name for fold in self.folds for name, _ in fold.axes]
        if len(set(names)) != len(names):
            raise LayoutRefused(f"mesh axes {', '.join(names)}: an axis is named twice")
        for name, size in self.sizes.items():
            if size < 1:
                raise LayoutRefused(f"mesh axis {name} has size {size}, and must have at least 1")
        own = dict(self.axes)
        for fold in self.folds:
            ours, theirs = prod(size for _, size in fold.axes), prod(own[name] for name in fold.of)
            if ours != theirs:
                raise LayoutRefused(
                    f"fold {_product(fold.axes)} = {ours} ranks, but {' * '.join(fold.of)} = {theirs} ranks",
                    next="give sizes whose products are equal",
                )

    @property
    def size(self) -> int:
        return prod(size for _, size in self.axes)

    @property
    def sizes(self) -> dict[str, int]:
        """Every axis and its size, folded ones included."""
        return dict(self.axes) | {name: size for fold in self.folds for name, size in fold.axes}

    def coordinates(self, rank: int) -> dict[str, int]:
        """The rank's coordinate on every axis, folded ones included.

        Raises: ValueError: no such rank.
        """
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is not in a mesh of {self.size} ranks")
        found: dict[str, int] = {}
        rest = rank
        for name, size in self.axes:
            rest, found[name] = divmod(rest, size)
        for fold in self.folds:
            rest = self.index(fold.of, found)
            for name, size in fold.axes:
                rest, found[name] = divmod(rest, size)
        return found

    def column(self, axis: str) -> Ints:
        """[size] int64: every rank's coordinate on this axis."""
        if axis not in self._columns:
            stride = 1
            ranks = np.arange(self.size, dtype=np.int64)
            for name, size in self.axes:
                self._columns[name] = ranks // stride % size
                stride *= size
            for fold in self.folds:
                index, stride = self.indices(fold.of, ranks), 1
                for name, size in fold.axes:
                    self._columns[name] = index // stride % size
                    stride *= size
        return self._columns[axis]

    def index(self, grid: Sequence[str], coordinates: Mapping[str, int]) -> int:
        """The place of these coordinates in the grid, its first axis fastest."""
        sizes, index, stride = self.sizes, 0, 1
        for name in grid:
            index += coordinates[name] * stride
            stride *= sizes[name]
        return index

    def indices(self, grid: Sequence[str], ranks: Ints) -> Ints:
        """[n] int64: `index` of the coordinates of each of these ranks."""
        sizes, stride = self.sizes, 1
        index = np.zeros(len(ranks), np.int64)
        for name in grid:
            index += self.column(name)[ranks] * stride
            stride *= sizes[name]
        return index

    def where(self, fixed: Mapping[str, int], ranks: Ints | None = None) -> Ints:
        """[n] int64, ascending: the ranks (of all, or of these) that have these coordinates."""
        chosen = np.arange(self.size, dtype=np.int64) if ranks is None else ranks
        for name, coordinate in fixed.items():
            chosen = chosen[self.column(name)[chosen] == coordinate]
        return chosen

    def basis(self, used: Iterable[str]) -> tuple[str, ...]:
        """The axes that tell all ranks apart and contain those used: a fold's own where one of them is used.

        Raises: LayoutRefused: axes of both sides of a fold are used.
        """
        used = set(used)
        names = [name for name, _ in self.axes]
        for fold in self.folds:
            theirs = [name for name, _ in fold.axes]
            if not used.intersection(theirs):
                continue
            both = used.intersection(fold.of)
            if both:
                raise LayoutRefused(
                    f"{', '.join(sorted(used.intersection(theirs)))} and {', '.join(sorted(both))} count the "
                    "same ranks in two ways, and cannot both be used for one tensor",
                    next=f"use {' * '.join(theirs)} or {' * '.join(fold.of)}",
                )
            at = min(names.index(name) for name in fold.of)
            names = [name for name in names if name not in fold.of]
            names[at:at] = theirs
        return tuple(names)


def build(
    grid: Sequence[str], folds: Sequence[tuple[Sequence[str], Sequence[str]]], sizes: Mapping[str, int]
) -> Mesh:
    """The mesh of a layout at these sizes; one size of a fold may be left out, and follows from the others.

    Raises: LayoutRefused: a size is missing, or names no axis, or a fold does not close.
    """
    known = {name for axes in (grid, *(axes for axes, _ in folds)) for name in axes}
    for name in sizes:
        if name not in known:
            raise LayoutRefused(
                f"the mesh given has an axis {name}, and the layout's mesh is {' * '.join(grid)}"
            )
    own = tuple((name, _size(name, sizes)) for name in grid)
    return Mesh(own, tuple(_fold(axes, of, dict(own), sizes) for axes, of in folds))


def _fold(axes: Sequence[str], of: Sequence[str], own: Mapping[str, int], sizes: Mapping[str, int]) -> Fold:
    for name in of:
        if name not in own:
            raise LayoutRefused(f"fold {' * '.join(axes)} = {' * '.join(of)}: the mesh has no axis {name}")
    missing = [name for name in axes if name not in sizes]
    if len(missing) != 1:
        return Fold(tuple((name, _size(name, sizes)) for name in axes), tuple(of))
    given, whole = prod(sizes[name] for name in axes if name in sizes), prod(own[name] for name in of)
    if given < 1 or whole % given:
        raise LayoutRefused(
            f"fold {' * '.join(axes)}: {given} does not divide the {whole} ranks of {' * '.join(of)}"
        )
    return Fold(tuple((name, sizes.get(name, whole // given)) for name in axes), tuple(of))


def _size(name: str, sizes: Mapping[str, int]) -> int:
    if name not in sizes:
        raise LayoutRefused(f"no size was given for mesh axis {name}", next=f"give {name}=N")
    return sizes[name]


def _product(axes: Sequence[tuple[str, int]]) -> str:
    return " * ".join(f"{name}({size})" for name, size in axes)
