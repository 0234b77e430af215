"""Axis expressions: runs against sequences written out element by element."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from layout_oracle import ext, prod, split, total

from ckptd.errors import LayoutRefused
from ckptd.layout import runs
from ckptd.layout.arithmetic import evaluate as number
from ckptd.layout.expressions import Axis, Extent, Number, Pad, Product, Split, Sum

SIZES = {"a": 2, "b": 3, "c": 1, "v": 2}
MESH = ("a", "b", "c")


def written_out(axis: Axis, at: dict[str, int]) -> tuple[list[tuple[str, int] | None], dict[str, int]]:
    """The sequence as a list of (summand, index), None for filler; and the extents."""
    if isinstance(axis, Extent):
        n = number(axis.size, SIZES)
        return [("", i) for i in range(n)], {"": n}
    if isinstance(axis, Sum):
        extents = {label: number(size, SIZES) for label, size in axis.parts}
        return [(label, i) for label, n in extents.items() for i in range(n)], extents
    if isinstance(axis, Product):
        found, extents = [("", 0)], {"": 1}
        for factor in axis.factors:
            right, theirs = written_out(factor, at)
            found = [
                x and y and (".".join(filter(None, (x[0], y[0]))), x[1] * theirs[y[0]] + y[1])
                for x, y in product(found, right)
            ]
            extents = {
                ".".join(filter(None, p)): extents[p[0]] * theirs[p[1]] for p in product(extents, theirs)
            }
        return found, extents
    inner, extents = written_out(axis.axis, at)
    if isinstance(axis, Pad):
        return inner + [None] * (-len(inner) % number(axis.multiple, SIZES)), extents
    ranks = int(np.prod([SIZES[n] for n in axis.grid]))
    width = -(-len(inner) // ranks)
    found = []
    for point in product(*([at[n]] if n in at else range(SIZES[n]) for n in reversed(axis.grid))):
        share, stride = 0, 1
        for name, coordinate in zip(axis.grid, reversed(point), strict=True):
            share, stride = share + coordinate * stride, stride * SIZES[name]
        found += inner[share * width : (share + 1) * width]
    return found, extents


def expanded(found: runs.Runs) -> list[tuple[str, int] | None]:
    return [
        None if s < 0 else (found.labels[s], a + i)
        for s, a, n in zip(found.summand, found.start, found.length, strict=True)
        for i in range(n)
    ]


@st.composite
def axes(draw: st.DrawFn, depth: int = 3, free: tuple[str, ...] = ("a", "b", "c", "v")) -> Axis:
    kind = draw(st.sampled_from(["extent", "sum", "product", "split", "pad"] if depth else ["extent"]))
    if kind == "extent":
        return ext(draw(st.integers(0, 7)))
    if kind == "sum":
        return total(**{label: draw(st.integers(0, 3)) for label in "qkv"[: draw(st.integers(1, 3))]})
    if kind == "product":
        return prod(*(draw(axes(depth - 1)) for _ in range(draw(st.integers(0, 3)))))
    if kind == "pad":
        return Pad(draw(axes(depth - 1)), Number(draw(st.integers(1, 5))))
    grid = draw(st.permutations(free))[: draw(st.integers(1, 3))]
    return split(draw(axes(depth - 1)), *grid)


@seed(20261121)
@settings(deadline=None, max_examples=200)
@given(axis=axes())
def test_runs_are_the_sequence_written_out(axis: Axis) -> None:
    points = [dict(zip(MESH, p, strict=True)) for p in product(*(range(SIZES[n]) for n in MESH))]
    columns = {name: np.array([point[name] for point in points]) for name in MESH}
    many = runs.table(axis, SIZES, columns, len(points))
    for i, at in enumerate(points):
        expected, extents = written_out(axis, at)
        found = runs.evaluate(axis, SIZES, at)
        assert expanded(found) == expected
        assert dict(zip(found.labels, found.extents, strict=True)) == extents
        assert found.size == len(expected) and (found.length > 0).all()
        rows = slice(many.ptr[many.index[i]], many.ptr[many.index[i] + 1])
        same = runs.Runs(many.labels, many.extents, many.summand[rows], many.start[rows], many.length[rows])
        assert expanded(same) == expected and many.sizes[many.index[i]] == len(expected)
        np.testing.assert_array_equal(many.local[rows], same.local)


def test_cost_follows_factors_and_not_elements() -> None:
    huge = Pad(split(prod(ext(1 << 20), ext(1 << 10), ext(3)), "a", "b"), Number(64))
    found = runs.evaluate(huge, SIZES, {"a": 1, "b": 2})
    assert len(found.length) <= 2 and found.size % 64 == 0
    fused = runs.evaluate(prod(split(ext(8), "a"), total(q=4, k=1, v=1), ext(128)), SIZES, {"a": 0})
    assert len(found.labels) == 1 and len(fused.length) == 4 * 3


def test_many_shares_are_cut_at_once() -> None:
    sizes = {"dp": 4096, "tp": 4}
    axis = split(prod(total(gate=1, up=1), split(ext(1 << 16), "tp")), "dp")
    points = np.arange(4096 * 4)
    many = runs.table(axis, sizes, {"tp": points % 4, "dp": points // 4}, len(points))
    assert len(many.sizes) == 4096 * 4 and int(many.length.sum()) == 2 << 16


def test_torch_chunk_leaves_the_last_ranks_short_or_empty() -> None:
    def shares(n: int) -> list[int]:
        return [runs.evaluate(Split(ext(n), ("r",)), {"r": 4}, {"r": r}).size for r in range(4)]

    assert shares(5) == [2, 2, 1, 0] and shares(3) == [1, 1, 1, 0] and shares(0) == [0, 0, 0, 0]


def test_explicit_widths() -> None:
    found = [runs.evaluate(split(ext(6), "b", widths=(1, 0, 5)), SIZES, {"b": r}) for r in range(3)]
    assert [(f.start.tolist(), f.length.tolist()) for f in found] == [([0], [1]), ([], []), ([1], [5])]


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (split(ext(6), "b", widths=(1, 5)), "3 ranks and 2 widths"),
        (split(ext(6), "b", widths=(1, 4, 2)), "add up to 7, and there are 6"),
        (split(ext(6), "b", widths=(7, -1, 0)), "add up to 6"),
        (ext(-1), "negative"),
        (total(q=-1), "negative"),
        (Sum((("q", Number(1)), ("q", Number(1)))), "twice"),
        (Pad(ext(3), Number(0)), "a multiple of 0 = 0"),
        (split(ext(3), "zz"), "zz is no axis of the mesh"),
    ],
)
def test_an_expression_without_meaning_is_refused(axis: Axis, message: str) -> None:
    with pytest.raises(LayoutRefused, match=message):
        runs.evaluate(axis, SIZES, {"b": 0})
