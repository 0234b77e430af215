"""Plans against the obvious way: gather the whole tensor, then scatter it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.layout import boxes, placements, plan
from ckptd.layout.placements import Placement, Replicate, Shard, Strided
from ckptd.layout.tiles import Tiles

Arrays = dict[tuple[int, str], np.ndarray]
FILLER = -1


# --- random tilings -----------------------------------------------------------------------------------


class Draw:
    """A seeded source of random tilings: meshes, splits, orders, flat buffers, paddings and replicas."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def number(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high + 1))

    def shape(self) -> tuple[int, ...]:
        sizes = [self.number(0, 9) if self.number(0, 9) == 0 else self.number(1, 9) for _ in range(4)]
        return tuple(sizes[: self.number(0, 4)])

    def tiles(self, shape: tuple[int, ...]) -> Tiles:
        return self._of_placements(shape) if self.number(0, 3) == 0 else self._of_covers(shape)

    def _of_placements(self, shape: tuple[int, ...]) -> Tiles:
        """A DTensor on a mesh of up to 5 axes, its ranks in any order."""
        mesh: list[int] = []
        for _ in range(self.number(0, 5)):
            mesh.append(self.number(1, 4) if prod(mesh) <= 6 else 1)
        chosen: list[Placement] = []
        for _ in mesh:
            dim = self.number(0, len(shape) - 1) if shape else 0
            kinds: list[Placement] = [Replicate(), Shard(dim), Shard(dim), Strided(dim, self.number(1, 4))]
            chosen.append(kinds[self.number(0, 3)] if shape else Replicate())
        self.random.shuffle(mesh)
        ranks = self.random.permutation(prod(mesh)).reshape(mesh)
        return placements.tiles(shape, mesh, chosen, "w", ranks)

    def _of_covers(self, shape: tuple[int, ...]) -> Tiles:
        """Each cover is tiled in its own way; places hold one array or two, with gaps (padding)."""
        covers = [self._cover(shape) for _ in range(self.number(1, 3))]
        names = ("a", "b")
        rows = [(c, *row) for c, cover in enumerate(covers) for row in cover]
        self.random.shuffle(rows)
        places = self.random.permutation(1 + max((row[1] for row in rows), default=0)) + self.number(0, 3)
        dims = len(shape)
        used: dict[tuple[int, int], int] = {}
        columns: list[list[object]] = [[] for _ in range(7)]
        for cover, rank, offset, size, order in rows:
            place, array = int(places[rank]), self.number(0, 1)
            start = used.get((place, array), 0) + self.number(0, 3)
            strides, extent = np.ones(dims, np.int64), 1
            for dim in order:  # the fastest dimension first; a row may be longer than what is in it
                strides[dim] = extent
                extent *= size[dim] + (self.number(0, 4) == 0)
            used[place, array] = start + extent
            for column, value in zip(
                columns, (offset, size, place, array, start, strides, cover), strict=True
            ):
                column.append(value)
        wide = (0, 1, 5)
        arrays = [
            np.array(c, np.int64).reshape((len(rows), dims) if i in wide else (len(rows),))
            for i, c in enumerate(columns)
        ]
        return Tiles(shape, *arrays, names)

    def _cover(
        self, shape: tuple[int, ...]
    ) -> list[tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Boxes (rank, offset, size, dimensions from the fastest) that tile the shape once."""
        dims = len(shape)
        if self.number(0, 2) == 0:  # a flat buffer in shares
            ranks, total = self.number(1, 6), prod(shape)
            cuts = np.sort(np.concatenate([[0, total], self.random.integers(0, total + 1, ranks - 1)]))
            which, offsets, sizes = boxes.of_ranges(shape, cuts[:-1], cuts[1:])
            order = tuple(reversed(range(dims)))
            return [
                (int(w), tuple(o), tuple(s), order)
                for w, o, s in zip(which, offsets.tolist(), sizes.tolist(), strict=True)
            ]
        axes = [(self.number(1, 4), self.number(0, max(dims - 1, 0))) for _ in range(self.number(0, 5))]
        cut = [[(0, n)] for n in shape]
        for count, dim in axes if dims else ():
            cut[dim] = [share for low, n in cut[dim] for share in self._shares(low, n, count)]
        order = tuple(self.random.permutation(dims).tolist())
        parts = list(itertools.product(*cut))
        ranks = self.number(1, 8)
        return [
            (i % ranks, tuple(a for a, _ in box), tuple(n for _, n in box), order)
            for i, box in enumerate(parts)
            if all(n > 0 for _, n in box)
        ]

    def _shares(self, low: int, size: int, count: int) -> list[tuple[int, int]]:
        if self.number(0, 1):
            each = -(-size // count)  # torch.chunk's rule
            cuts = [min(i * each, size) for i in range(count + 1)]
        else:
            cuts = sorted([0, size, *self.random.integers(0, size + 1, count - 1).tolist()])
        return [(low + a, b - a) for a, b in itertools.pairwise(cuts)]


# --- the oracle ---------------------------------------------------------------------------------------


def elements(tiles: Tiles) -> Iterator[tuple[tuple[int, str], np.ndarray, np.ndarray]]:
    """Box by box: its array, and of every element the flat logical index and the position in the array."""
    logical = boxes.row_major(tiles.shape)
    for i in range(len(tiles)):
        flat, at = np.zeros((), np.int64), tiles.start[i]
        for dim, (offset, size) in enumerate(zip(tiles.offsets[i], tiles.sizes[i], strict=True)):
            flat = np.add.outer(flat, np.arange(offset, offset + size) * logical[dim])
            at = np.add.outer(at, np.arange(size) * tiles.strides[i, dim])
        yield (int(tiles.place[i]), tiles.arrays[tiles.array[i]]), flat, at


def empty(tiles: Tiles) -> Arrays:
    length: dict[tuple[int, str], int] = {}
    for key, _, at in elements(tiles):
        length[key] = max(length.get(key, 0), int(at.max()) + 1)
    return {key: np.full(n, FILLER, np.int64) for key, n in length.items()}


def scattered(values: np.ndarray, tiles: Tiles) -> Arrays:
    arrays = empty(tiles)
    for key, flat, at in elements(tiles):
        arrays[key][at] = values[flat]
    return arrays


def gathered(arrays: Arrays, tiles: Tiles) -> np.ndarray:
    values = np.full(prod(tiles.shape), FILLER)
    for key, flat, at in elements(tiles):
        values[flat] = arrays[key][at]
    return values


def check(seed: int) -> None:
    draw = Draw(seed)
    shape = draw.shape()
    source, target = draw.tiles(shape), draw.tiles(shape)
    held = scattered(1000 + np.arange(prod(shape)), source)
    expected = scattered(gathered(held, source), target)

    found = plan.copies(source, target)
    assert found.elements == sum(prod(size) for size in target.sizes.tolist())
    got = empty(target)
    plan.execute(found, lambda place, name: held[place, name], lambda place, name: got[place, name])
    assert got.keys() == expected.keys()
    for key, array in expected.items():
        assert np.array_equal(got[key], array), (seed, key)

    check_runs(found, held, expected, draw)
    if len(target):
        place = int(draw.random.choice(target.place))
        alone = plan.copies(source, target.at(target.place == place))
        assert rows(alone) == rows(at(found, found.target_place == place)), seed


def check_runs(found: plan.Copies, held: Arrays, expected: Arrays, draw: Draw) -> None:
    """The runs move the same bytes, each once; blocks hold all that is read, and only what is touched."""
    runs = plan.runs(found, 8)
    plain = runs.expanded()
    assert runs.bytes == plain.bytes == found.elements * 8
    assert plain.repeats.shape[1] == 0 and (plain.length > 0).all()
    got, written = copied(expected), copied(expected, 0)
    read: set[tuple[int, int]] = set()
    block = draw.number(1, 40)
    columns = (
        plain.source_place, plain.source_array, plain.source_start,
        plain.target_place, plain.target_array, plain.target_start, plain.length,
    )  # fmt: skip
    for p, x, a, q, y, b, n in zip(*(column.tolist() for column in columns), strict=True):
        goal = (q, plain.target_arrays[y])
        got[goal].view(np.uint8)[b : b + n] = held[p, plain.source_arrays[x]].view(np.uint8)[a : a + n]
        written[goal].view(np.uint8)[b : b + n] += 1
        which = p * len(plain.source_arrays) + x
        read.update((which, k) for k in range(a // block, (a + n - 1) // block + 1))
    assert all(array.view(np.uint8).max() <= 1 for array in written.values())
    for key, array in expected.items():
        assert np.array_equal(got[key], array)
    touched = plan.blocks(runs, block)
    ranges = zip(touched.object.tolist(), touched.first.tolist(), touched.stop.tolist(), strict=True)
    assert {(o, k) for o, first, stop in ranges for k in range(first, stop)} == read
    assert touched.read_bytes == len(read) * block


def copied(arrays: Arrays, fill: int = FILLER) -> Arrays:
    return {key: np.full_like(array, fill) for key, array in arrays.items()}


def at(found: plan.Copies, chosen: np.ndarray) -> plan.Copies:
    names = ("shape", "source_arrays", "target_arrays")
    columns = {k: v[chosen] for k, v in vars(found).items() if k not in names}
    return replace(found, **columns)


def rows(found: plan.Copies) -> list[tuple[int, ...]]:
    names = ("shape", "source_arrays", "target_arrays")
    columns = [v.reshape(len(found), -1) for k, v in vars(found).items() if k not in names]
    return sorted(map(tuple, np.concatenate(columns, axis=1).tolist()))


seeds = st.integers(0, 2**32 - 1)
quiet = [HealthCheck.too_slow]


def test_plans_move_what_gather_then_scatter_moves() -> None:
    done = 0

    @settings(deadline=None, max_examples=2000, suppress_health_check=quiet, derandomize=True, database=None)
    @given(seeds)
    def run(seed: int) -> None:
        nonlocal done
        check(seed)
        done += 1

    run()
    print(f"{done:,} random plans equal gather-then-scatter")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_plans_move_what_gather_then_scatter_moves_in_full() -> None:
    count = 50_000
    for seed in range(count):
        check(seed)
    print(f"{count:,} random plans equal gather-then-scatter (seeds 0 to {count - 1})")


# --- one by one ---------------------------------------------------------------------------------------


def shards(
    shape: tuple[int, ...], dim: int, count: int, covers: int = 1, names: tuple[str, ...] = ("w",)
) -> Tiles:
    """A dimension in equal shares at places 0, 1, ..., each cover on places of its own."""
    each = list(shape)
    each[dim] //= count
    n = count * covers
    offsets = np.zeros((n, len(shape)), np.int64)
    offsets[:, dim] = np.tile(np.arange(count) * each[dim], covers)
    zeros = np.zeros(n, np.int64)
    strides = np.tile(np.array(boxes.row_major(each), np.int64), (n, 1))
    cover = np.repeat(np.arange(covers), count)
    return Tiles(shape, offsets, np.tile(each, (n, 1)), np.arange(n), zeros, zeros, strides, cover, names)


def test_the_nearest_cover_is_taken_where_one_is_near() -> None:
    source = shards((8, 3), 0, 4, covers=3)
    found = plan.copies(source, source)
    assert np.array_equal(found.source_place, found.target_place)
    # Halves are two shares: if one of them is in place it is taken there, and the other from the same cover.
    found = plan.copies(source, shards((8, 3), 0, 2, covers=6))
    lies = {0: 0, 3: 0, 4: 1, 7: 1, 8: 2, 11: 2}  # of these places the share and the half overlap
    for place, cover in lies.items():
        assert set(found.source_place[found.target_place == place] // 4) == {cover}
        assert place in found.source_place[found.target_place == place]
    # Of two covers that are near, the one that has more of the box.
    thirds = shards((12,), 0, 4)
    both = Tiles(
        (12,),
        np.array([[0], [3], [6], [9], [0], [8]]),
        np.array([[3], [3], [3], [3], [8], [4]]),
        np.array([0, 1, 2, 3, 0, 1]),
        *[np.zeros(6, np.int64)] * 2,
        np.ones((6, 1), np.int64),
        np.array([0, 0, 0, 0, 1, 1]),
        ("w",),
    )
    wide = replace(thirds.at(np.array([0])), sizes=np.array([[6]]))
    assert plan.copies(both, wide).sizes.tolist() == [[6]]
    swapped = replace(both, cover=1 - both.cover)
    assert plan.copies(swapped, wide).sizes.tolist() == [[6]]
    # Places that are files: a caller says which is near.
    moved = replace(source, place=source.place + 100)
    found = plan.copies(moved, source, near=lambda places: places + 100)
    assert np.array_equal(found.source_place, found.target_place + 100)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 8, 64])
def test_covers_share_the_work_evenly_whatever_the_spacing_of_places(step: int) -> None:
    source = shards((8,), 0, 2, covers=8)
    target = shards((8,), 0, 1, covers=64)
    found = plan.copies(source, replace(target, place=1000 * 64 + target.place * step))
    used = np.bincount(found.source_place // 2, minlength=8)
    assert used.sum() == 128 and used.max() <= 2 * used.min(), used


def test_a_cover_with_a_hole_is_passed_over_and_no_whole_cover_is_an_error() -> None:
    source, target = shards((8,), 0, 4, covers=2), shards((8,), 0, 2)
    found = plan.copies(source.at(source.place != 1), target)
    assert set(found.source_place.tolist()) == {4, 5, 6, 7}
    with pytest.raises(ValueError, match=r"no cover .* 8 elements .* the fullest of 2 holds 6"):
        plan.copies(source.at((source.place != 1) & (source.place != 6)), target)
    overlapping = replace(target, offsets=np.zeros((2, 1), np.int64))
    with pytest.raises(ValueError, match=r"fills 8 of 4 elements of the box at \(0,\) of size \(4,\)"):
        plan.copies(overlapping, target)
    with pytest.raises(ValueError, match="cannot fill"):
        plan.copies(source, shards((6,), 0, 2))


def test_tensors_tiled_alike_share_one_join_and_keep_their_names() -> None:
    def pair(name: str, shape: tuple[int, ...]) -> tuple[str, Tiles, Tiles]:
        return name, shards(shape, 0, 4, names=(f"src.{name}",)), shards(shape, 1, 2, names=(f"dst.{name}",))

    found = plan.plan([pair("a", (8, 4)), pair("b", (8, 4)), pair("c", (8, 6)), pair("d", (8, 4))])
    assert len(found.classes) == 2 and list(found) == ["a", "b", "c", "d"] and len(found) == 4
    assert found.copies("d").source_arrays == ("src.d",) and found.copies("b").target_arrays == ("dst.b",)
    assert rows(found.copies("b")) == rows(plan.copies(*pair("b", (8, 4))[1:]))
    with pytest.raises(ValueError, match="'a' comes twice"):
        plan.plan([pair("a", (8, 4)), pair("a", (8, 4))])
    with pytest.raises(ValueError, match="tensor 'x': a tensor of shape"):
        plan.plan([("x", shards((8,), 0, 2), shards((6,), 0, 2))])


def test_long_runs_are_merged_and_short_ones_are_repeats() -> None:
    whole = plan.runs(plan.copies(shards((8, 16), 0, 4), shards((8, 16), 0, 2)), 4)
    assert whole.length.tolist() == [2 * 16 * 4] * 4 and whole.counts.tolist() == [1] * 4
    split = plan.runs(plan.copies(shards((8, 16), 1, 4), shards((8, 16), 1, 2)), 4)
    assert split.length.tolist() == [16] * 4 and split.counts.tolist() == [8] * 4
    assert split.expanded().length.tolist() == [16] * 32
    # Flat ranges of a tensor are several boxes at both sides, and yet one run.
    offsets, sizes = boxes.of_range((3, 4, 5), 7, 53)
    tiles = Tiles(
        (3, 4, 5), offsets, sizes, *[np.zeros(len(sizes), np.int64)] * 2,
        offsets @ np.array([20, 5, 1]), np.tile([20, 5, 1], (len(sizes), 1)),
        np.zeros(len(sizes), np.int64), ("w",),
    )  # fmt: skip
    assert len(sizes) == 5
    whole_tensor = Tiles(
        (3, 4, 5), np.zeros((1, 3), np.int64), np.array([[3, 4, 5]]), *[np.zeros(1, np.int64)] * 3,
        np.array([[20, 5, 1]]), np.zeros(1, np.int64), ("w",),
    )  # fmt: skip
    merged = plan.runs(plan.copies(whole_tensor, tiles), 2)
    assert merged.length.tolist() == [46 * 2] and merged.source_start.tolist() == [14]


def test_neighbours_of_different_tensors_in_one_buffer_are_one_run() -> None:
    first = shards((6,), 0, 1, names=("flat", "a"))
    second = replace(first, start=np.array([6]), arrays=("b", "flat"), array=np.array([1]))
    joined = plan.join([plan.runs(plan.copies(tiles, tiles), 4) for tiles in (first, second)])
    assert joined.length.tolist() == [48]
    assert joined.source_arrays[joined.source_array[0]] == "flat"
    assert len(plan.join([])) == 0


def test_a_summary_counts_bytes_runs_and_what_blocks_read_too_much() -> None:
    def pair(name: str) -> tuple[str, Tiles, Tiles]:
        return name, shards((64, 512), 0, 4), shards((64, 512), 1, 4)

    found = plan.summary(plan.plan([pair("a"), pair("b")]), 4, block_bytes=1024)
    total = 2 * 64 * 512 * 4
    assert (found.bytes, found.local_bytes, found.copies) == (total, total // 4, 32)
    assert (found.runs, found.median_run_bytes, found.amplification) == (2 * 4 * 64, 512, 1.0)
    assert "262,144 bytes (65,536 of them in place) in 32 copies of 512 runs, median 512 bytes" in str(found)
    one = plan.copies(pair("a")[1], pair("a")[2].at(np.array([0])))
    assert plan.summary(one, 4, block_bytes=1024).amplification == 2.0  # half of each block is another's
    assert plan.summary(plan.plan([pair("a")]), lambda name: {"a": 2}[name]).bytes == total // 4
    assert plan.summary(plan.plan([]), 4, block_bytes=1024).amplification == 1.0


def test_blocks_know_where_arrays_lie_in_files() -> None:
    runs = plan.runs(plan.copies(shards((64,), 0, 4), shards((64,), 0, 1)), 4)
    assert plan.blocks(runs, 64).read_bytes == 4 * 64
    found = plan.blocks(runs, 64, lambda place, array: (0 * place, 32 + place * 64))
    assert (found.object.tolist(), found.first.tolist(), found.stop.tolist()) == ([0], [0], [5])
    assert found.amplification == 5 / 4
    # What two places want is read once.
    twice = plan.runs(plan.copies(shards((64,), 0, 4), shards((64,), 0, 1, covers=2)), 4)
    assert plan.blocks(twice, 64).read_bytes == plan.blocks(twice, 64).needed_bytes == 4 * 64


def test_execute_refuses_what_would_reach_out_of_an_array_or_cast() -> None:
    found = plan.copies(shards((8, 4), 0, 2), shards((8, 4), 1, 2))
    long = {place: np.zeros(16, np.float32) for place in (0, 1)}
    with pytest.raises(ValueError, match=r"too small|incompatible"):
        plan.execute(found, lambda p, _: long[p][:15], lambda p, _: long[p].copy())
    with pytest.raises(ValueError, match="without a cast"):
        plan.execute(found, lambda p, _: long[p], lambda p, _: long[p].astype(np.float64))
    with pytest.raises(ValueError, match="not flat and contiguous"):
        plan.execute(found, lambda p, _: np.zeros(32, np.float32)[::2], lambda p, _: long[p].copy())
