"""The proof: right layouts pass, structurally wrong ones are refused, and meaning is never claimed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod as multiply

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from layout_oracle import compare, ext, iota, layout, name, prod, rep, size, split, total

from ckptd.errors import LayoutRefused
from ckptd.layout import runs
from ckptd.layout.claims import Claims
from ckptd.layout.expressions import (
    Align,
    Average,
    Axis,
    Drop,
    Extent,
    Flat,
    Layout,
    Number,
    On,
    Pad,
    PadTo,
    Rest,
    Rule,
    SplitOver,
    Store,
    Sum,
    Tied,
)
from ckptd.layout.proof import prove
from ckptd.layout.resolve import Placement, resolve


def place(
    model: Layout, shapes: dict[str, tuple[int, ...]], mesh: dict[str, int], **parameters: int
) -> Placement:
    return resolve(model, parameters=parameters, mesh=mesh, shapes=shapes)


# --- structure
# ------------------------------------------------------------------------------------------------------

LAYERS = {f"layers.{n}.w": (6, 4) for n in range(4)}


def test_a_layer_claimed_by_two_rules_is_refused() -> None:
    model = layout(
        ("pp",),
        Rule(name("layers.{l}.w", l=("pp",)), None),
        Rule(name("extra.w"), None, (name("layers.2.w"),)),
        parameters=("l",),
    )
    with pytest.raises(
        LayoutRefused, match=r"layers\.2\.w is claimed twice, by line 1 .* and by line 2 \(extra\.w\)"
    ) as e:
        place(model, LAYERS, {"pp": 2}, l=4)
    assert e.value.rule == 2 and e.value.tensor == "layers.2.w"


def test_a_layer_held_by_two_stages_is_refused() -> None:
    model = layout(("pp",), Rule(name("layers.{l}.w"), None), parameters=("l",))
    with pytest.raises(
        LayoutRefused, match=r"line 1: layers\.0\.w is held 2 times over axis pp, but .* `rep pp`"
    ):
        prove(place(model, LAYERS, {"pp": 2}, l=4))


def test_an_expert_that_no_rule_claims_is_refused() -> None:
    shapes = {f"experts.{n}.w": (4, 2) for n in range(8)}
    model = layout(("ep",), Rule(name("experts.{e}.w", e=("ep",)), None), parameters=("e",))
    assert prove(place(model, shapes, {"ep": 4}, e=8)).tensors == 8
    with pytest.raises(LayoutRefused, match=r"no rule claims experts\.7\.w. Next: write a rule"):
        prove(place(model, shapes, {"ep": 4}, e=7))
    with pytest.raises(LayoutRefused, match="no rule claims"):
        place(model, shapes, {"ep": 4}, e=7).tiles("experts.7.w")


def test_an_expert_that_no_rank_holds_is_refused() -> None:
    shapes = {"experts.0.w": (4, 2), "experts.1.w": (4, 2)}
    model = layout(
        ("ep",), Rule(name("experts.{e}.w", e=("ep",)), None, (), (On("ep", Number(0)),)), parameters=("e",)
    )
    with pytest.raises(
        LayoutRefused, match=r"line 1: no rank holds experts\.1\.w \(all 8 elements are missing\)"
    ):
        prove(place(model, shapes, {"ep": 2}, e=2))


def test_forgotten_padding_is_refused_by_what_the_ranks_really_hold() -> None:
    shapes = {"embed": (10, 3)}
    stored = {rank: {"embed": (4, 3)} for rank in range(3)}
    padded = layout(("tp",), Rule(name("embed"), (split(Pad(ext(10), size("tp")), "tp"), ext(3))))
    assert prove(place(padded, shapes, {"tp": 3}), stored=stored).padding == 6
    forgotten = layout(("tp",), Rule(name("embed"), (split(ext(10), "tp"), ext(3))))
    with pytest.raises(
        LayoutRefused,
        match=r"rank 2 holds embed with shape \[4, 3\] = 12 elements, and the layout says \[2, 3\] = 6",
    ) as e:
        prove(place(forgotten, shapes, {"tp": 3}), stored=stored)
    assert "volumes do not close" in str(e.value)


def test_a_split_of_the_wrong_dimension_is_refused() -> None:
    model = layout(
        ("tp",), Rule(name("layers.{l}.w"), (ext("h"), split(ext("f"), "tp"))), parameters=("l", "h", "f")
    )
    with pytest.raises(
        LayoutRefused, match=r"says that layers\.0\.w has shape \[4, 6\], but its shape is \[6, 4\]"
    ):
        place(model, LAYERS, {"tp": 2}, l=4, h=4, f=6)
    stored = {rank: {"w": (3, 4)} for rank in range(2)}
    model = layout(("tp",), Rule(name("w"), (ext("_"), split(ext("_"), "tp"))))
    with pytest.raises(
        LayoutRefused, match=r"shape \[3, 4\] = 12 elements, and the layout says \[6, 2\] = 12"
    ):
        prove(place(model, {"w": (6, 4)}, {"tp": 2}), stored=stored)


def test_a_split_of_two_dimensions_over_one_axis_is_refused_with_the_element_and_ranks() -> None:
    model = layout(("tp",), Rule(name("w"), (split(ext(6), "tp"), split(ext(4), "tp"))))
    with pytest.raises(LayoutRefused) as e:
        prove(place(model, {"w": (6, 4)}, {"tp": 2}))
    assert "line 1: w: element [0, 2] of shape [6, 4] is held by no rank" in str(e.value)
    assert "12 of 24 elements are held by ranks 0, 1" in str(e.value)


def test_a_dimension_split_twice_over_one_axis_is_refused() -> None:
    axis = prod(split(ext(4), "tp"), split(ext(4), "tp"))
    with pytest.raises(LayoutRefused, match=r"element \[2\] of shape \[16\] is held by no rank"):
        prove(place(layout(("tp",), Rule(name("w"), (axis,))), {"w": (16,)}, {"tp": 2}))


def flat_model(multiple: int, align: int = 1) -> Layout:
    steps = ((Align(Number(align)),), (PadTo(Number(multiple)), SplitOver(("dp",))))
    return layout(
        ("dp",),
        Rule(name("*"), None),
        stores=(Store(name("f"), name("buffer"), Flat("module", False, *steps), 5),),
    )


def test_a_flat_buffer_with_the_wrong_alignment_is_refused() -> None:
    shapes = {"a": (3,), "b": (5, 2), "c": (7,)}
    right = place(flat_model(8, 4), shapes, {"dp": 4})
    stored = {rank: right.arrays(rank) for rank in range(4)}
    prove(right, stored=stored)
    with pytest.raises(
        LayoutRefused, match=r"holds buffer with shape \[6\] = 6 elements, and the layout says \[10\]"
    ):
        prove(place(flat_model(8, 16), shapes, {"dp": 4}), stored=stored)
    with pytest.raises(
        LayoutRefused, match="line 5: the buffer of 21 elements does not split evenly over dp = 4 ranks"
    ):
        prove(place(flat_model(7), shapes, {"dp": 4}))


def test_arrays_that_are_there_and_not_in_the_layout_and_the_reverse() -> None:
    model = layout(
        ("dp",),
        Rule(name("w"), None),
        Rule(name("*.extra"), None, (), (Drop(),)),
        Rule(name("t"), None, (), (Tied(name("w")),)),
    )
    placement = place(model, {"w": (2,), "t": (2,)}, {"dp": 1})
    prove(placement, stored={0: {"w": (2,), "x.extra": (9,), "t": (2,)}})
    with pytest.raises(LayoutRefused, match=r"rank 0 holds v \[3\], which no rule claims"):
        prove(placement, stored={0: {"w": (2,), "v": (3,)}})
    with pytest.raises(LayoutRefused, match="rank 0 should hold w"):
        prove(placement, stored={0: {}})


def test_two_arrays_of_one_name_at_one_place_are_refused() -> None:
    rules = [
        Rule(name("same"), None, (name(key),), (On("pp", Number(at)),))
        for key, at in (("a", 0), ("b", 1), ("c", 1))
    ]
    shapes = dict.fromkeys("abc", (2,))
    prove(place(layout(("pp",), *rules[:2]), {"a": (2,), "b": (2,)}, {"pp": 2}))
    with pytest.raises(
        LayoutRefused, match=r"line 3: rank 1 would hold two arrays called same: for b .line 2. and for c"
    ):
        prove(place(layout(("pp",), *rules), shapes, {"pp": 2}))


def test_padding_needs_a_fill_where_it_is_written() -> None:
    model = layout(("tp",), Rule(name("w"), (split(Pad(ext(3), Number(4), "none"), "tp"),)))
    placement = place(model, {"w": (3,)}, {"tp": 2})
    with pytest.raises(LayoutRefused, match="line 1: the padding of w has no fill"):
        prove(placement)
    assert prove(placement, written=False).padding == 1


def test_averages_are_replicas_that_are_recorded() -> None:
    placement = place(layout(("dp",), Rule(name("w"), None, (), (Average(("dp",)),))), {"w": (3,)}, {"dp": 3})
    assert placement.tiles("w").cover.tolist() == [0, 1, 2] and prove(placement).lossy == {"w": "avg"}


# --- meaning
# --------------------------------------------------------------------------------------------------------


def test_what_no_proof_can_know_is_never_confirmed_without_a_reference() -> None:
    shapes = dict.fromkeys(("k", "v"), (4, 3))
    for first, second in (("k", "v"), ("v", "k")):
        model = layout(
            ("tp",),
            Rule(
                name("kv"), (prod(total(k=1, v=1), split(ext(4), "tp")), ext(3)), (name(first), name(second))
            ),
        )
        placement = place(model, shapes, {"tp": 2})
        report = prove(placement)
        assert report.unconfirmed == ("k", "v") and "layout unconfirmed: 2 tensors" in str(report)
        report = prove(placement, references=["k", "elsewhere"])
        assert report.confirmed == {"k"} and "layout unconfirmed: 1 tensors" in str(report)


# --- the proof itself: damage a placement, and it says so
# ---------------------------------------------------------


class Damaged(Placement):
    """A placement whose tiles of `w` are changed by a function."""

    def __init__(self, whole: Placement, change: object) -> None:
        super().__init__(
            whole.layout, whole.mesh, whole.values, {n: whole.shape(n) for n in whole.names}, whole.claims
        )
        self.change = change

    def tiles(self, name: str, places: object = None):  # type: ignore[no-untyped-def, override]
        return self.change(super().tiles(name, places))  # type: ignore[operator, arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.at(np.arange(len(t)) != 1), r"element \[2, 0\] of shape \[6, 4\] is held by no rank"),
        (
            lambda t: replace(t, offsets=t.offsets - np.array([[0, 0], [1, 0], [0, 0]])),
            r"element \[1, 0\] .* is held 2 times",
        ),
        (
            lambda t: replace(t, offsets=t.offsets + np.array([[0, 0], [0, 0], [1, 0]])),
            r"rank 2 holds \[5:7, 0:4\] of it",
        ),
        (
            lambda t: replace(t, place=t.place * 0),
            "volumes of rank 0 do not close: its arrays have 8 .* its tiles 24",
        ),
    ],
)
def test_damaged_tiles_are_found(change: object, message: str) -> None:
    model = layout(("tp",), Rule(name("w"), (split(ext(6), "tp"), Rest())))
    with pytest.raises(LayoutRefused, match=message):
        prove(Damaged(place(model, {"w": (6, 4)}, {"tp": 3}), change))


def test_claims_are_what_the_proof_starts_from() -> None:
    placement = place(layout(("dp",), Rule(name("w"), None)), {"w": (2,)}, {"dp": 1})
    placement.claims = Claims(
        (), {}, (), (), {"w": 0}
    )  # claimed, but stored nowhere: an alias without target
    assert prove(placement).tensors == 0


# --- random layouts
# ---------------------------------------------------------------------------------------------


@st.composite
def random_layouts(draw: st.DrawFn) -> tuple[Layout, dict[str, int], dict[str, tuple[int, ...]]]:
    """One fused stored tensor and its pieces: every mesh axis splits a dimension, or replicates."""
    names = list("abcde")[: draw(st.integers(1, 5))]
    mesh = {n: draw(st.integers(1, 3)) for n in names}
    free = list(draw(st.permutations(names)))
    used: list[str] = []

    def grid() -> tuple[str, ...]:
        taken = [free.pop() for _ in range(draw(st.integers(0, min(2, len(free)))))]
        used.extend(taken)
        return tuple(taken)

    def wrap(axis: Axis) -> Axis:
        if draw(st.booleans()):
            axis = Pad(axis, Number(draw(st.integers(1, 6))), draw(st.sampled_from(["zero", "last"])))
        return split(axis, *over) if (over := grid()) else axis

    def axis(fused: bool) -> Axis:
        factors = [wrap(ext(draw(st.integers(1, 5)))) for _ in range(draw(st.integers(1, 2)))]
        if fused:
            factors.insert(
                draw(st.integers(0, len(factors))),
                total(p=draw(st.integers(1, 3)), q=draw(st.integers(1, 2))),
            )
        return wrap(prod(*factors))

    dims = draw(st.integers(1, 3))
    fused = draw(st.integers(0, dims))
    axes = tuple(axis(dim == fused) for dim in range(dims))
    pieces = [name(p) for p in ("p", "q")[: 2 if fused < dims else 1]]
    flat_grid = tuple(free) if free and draw(st.booleans()) else ()
    stores = ()
    if flat_grid:
        pad = PadTo(Number(multiply(mesh[n] for n in flat_grid)))
        steps: tuple = (pad, SplitOver(flat_grid))  # type: ignore[type-arg]
        item = draw(st.booleans())
        stores = (
            Store(
                name("f"),
                name("buffer"),
                Flat("module", per_item=steps if item else (), whole=() if item else steps),
            ),
        )
    replicas = tuple(n for n in free if n not in flat_grid)
    model = layout(tuple(names), Rule(name("w"), axes, tuple(pieces), (rep(*replicas),)), stores=stores)
    everywhere = runs.evaluate
    shapes = {}
    for label, piece in enumerate(("p", "q")[: len(pieces)]):
        extents = [everywhere(one, mesh, dict.fromkeys(mesh, 0)).extents for one in axes]
        shapes[piece] = tuple(e[label] if len(e) > 1 else e[0] for e in extents)
    return model, mesh, shapes


def check_random(case: tuple[Layout, dict[str, int], dict[str, tuple[int, ...]]]) -> None:
    model, mesh, shapes = case
    placement = resolve(model, parameters={}, mesh=mesh, shapes=shapes)
    report = prove(placement)
    assert report.elements == sum(multiply(shape) for shape in shapes.values())
    for piece, shape in shapes.items():
        tiles = placement.tiles(piece)
        covers = np.zeros((int(tiles.cover.max()) + 1, *shape), np.int64)
        for i in range(len(tiles)):
            box = tuple(slice(a, a + n) for a, n in zip(tiles.offsets[i], tiles.sizes[i], strict=True))
            covers[(tiles.cover[i], *box)] += 1
        assert (covers == 1).all()
    # Written through the tiles and the fillers, no local element is touched twice (scatter asserts it) or
    # never.
    if placement.mesh.size <= 24:
        from layout_oracle import UNTOUCHED, scatter

        marks = iota(shapes)
        for rank in range(placement.mesh.size):
            assert all((a != UNTOUCHED).all() for a in scatter(placement, marks, rank, only=True).values())


@seed(20261122)
@settings(deadline=None, max_examples=120)
@given(case=random_layouts())
def test_random_layouts_are_bijections(
    case: tuple[Layout, dict[str, int], dict[str, tuple[int, ...]]],
) -> None:
    check_random(case)


@pytest.mark.soak
@seed(20261123)
@settings(deadline=None, max_examples=5000)
@given(case=random_layouts())
def test_many_random_layouts_are_bijections(
    case: tuple[Layout, dict[str, int], dict[str, tuple[int, ...]]],
) -> None:
    check_random(case)


def test_one_rank_of_a_large_mesh_is_computed_by_itself() -> None:
    """16,384 ranks: one rank's tiles touch no column of boxes of the others."""
    layers = 50
    shapes = {f"layers.{n}.{k}": (4096, 1024) for n in range(layers) for k in "abcdefgh"}
    model = layout(
        ("tp", "dp", "pp"),
        *(
            Rule(name("layers.{l}." + k, l=("pp",)), (split(split(ext("_"), "tp"), "dp"), ext("_")))
            for k in "abcdefgh"
        ),
        parameters=("l",),
    )
    placement = resolve(model, parameters={"l": layers}, mesh={"tp": 8, "dp": 128, "pp": 16}, shapes=shapes)
    rank = 12_345
    held = [n for n in placement.names if len(placement.tiles(n, [rank]))]
    assert {len(placement.tiles(n, [rank])) for n in held} == {1} and len(held) % 8 == 0 and held
    assert not placement._whole, "no tensor was computed for all ranks"
    at = placement.mesh.coordinates(rank)
    assert placement.tiles(held[0], [rank]).offsets[0, 0] == at["tp"] * 512 + at["dp"] * 4
    for point in product((0, 16_383), held[:1]):
        placement.tiles(point[1], [point[0]])
    assert not isinstance(model.rules[0].axes[0], (Extent, Sum))  # type: ignore[index]


def test_marks_agree_for_one_small_case_by_hand() -> None:
    model = layout(("a",), Rule(name("w"), (split(ext(3), "a"),)))
    placement = place(model, {"w": (3,)}, {"a": 2})
    assert compare(placement, iota({"w": (3,)}), {0: {"w": np.array([0, 1])}, 1: {"w": np.array([2])}}) == 6
