"""Flat buffers: offsets of items, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from layout_oracle import ext, layout, name, rep, size, split

from ckptd.errors import LayoutRefused
from ckptd.layout import flat
from ckptd.layout.expressions import Align, Flat, Number, PadTo, Rule, SplitOver, Store, Strip
from ckptd.layout.resolve import Placement, resolve

SIZES = {"dp": 4, "tp": 2}


def lay(sizes: list[int], per_item: tuple = (), whole: tuple = ()) -> flat.Buffer:  # type: ignore[type-arg]
    return flat.lay(flat.steps(Flat("module", per_item=per_item, whole=whole), SIZES, SIZES, 7), sizes, 7)


def test_items_are_aligned_and_the_end_is_padded() -> None:
    buffer = lay([3, 8, 1], (Align(Number(4)),), (PadTo(Number(8)), SplitOver(("dp",))))
    assert buffer.start.tolist() == [0, 4, 12] and buffer.end == 13 and buffer.share == 4
    assert buffer.stored(np.arange(4)).tolist() == [4, 4, 4, 4]
    low, high, base = buffer.ranges(1, np.zeros(4, np.int64), np.arange(4))
    assert [(a, b) if a < b else None for a, b in zip(low, high, strict=True)] == [None, (0, 4), (4, 8), None]
    assert base.tolist() == [4, 0, -4, -8]


def test_stripped_padding_may_reach_over_several_ranks() -> None:
    buffer = lay([5], (), (PadTo(Number(16)), SplitOver(("dp",)), Strip()))
    assert buffer.stored(np.arange(4)).tolist() == [4, 1, 0, 0]


def test_items_split_by_themselves() -> None:
    buffer = lay([5, 1], (PadTo(size("dp")), SplitOver(("dp",)), PadTo(Number(3))))
    assert buffer.width.tolist() == [2, 1] and buffer.start.tolist() == [0, 3] and buffer.share == 6
    for share in range(4):
        low, high, base = buffer.all_ranges(share, 0)
        for item in range(2):
            same = buffer.ranges(item, np.array([share]), np.zeros(1, np.int64))
            assert [int(x[0]) for x in same] == [low[item], high[item], base[item]]


@pytest.mark.parametrize(
    ("per_item", "whole", "message"),
    [
        (
            (SplitOver(("dp",)),),
            (),
            r"an item of 5 elements does not split evenly over dp = 4 ranks. Next: pad it first",
        ),
        ((), (SplitOver(("dp",)),), "the buffer of 6 elements does not split evenly over dp = 4"),
        ((), (PadTo(Number(6)), SplitOver(("dp",))), "the buffer of 6 elements does not split evenly"),
        ((Strip(),), (), "strip is a step of the whole"),
        ((), (Align(Number(2)),), "align is a step of items"),
        ((), (SplitOver(("dp",)), PadTo(Number(2))), "padded after its split"),
        ((SplitOver(("dp",)), SplitOver(("tp",))), (), "two splits"),
        ((PadTo(Number(4)), SplitOver(("dp",))), (SplitOver(("dp",)),), "both split over dp"),
        ((), (SplitOver(("zz",)),), "zz, which is no mesh axis"),
        ((Align(Number(0)),), (), "a multiple of 0"),
    ],
)
def test_steps_that_do_not_fit_are_refused(per_item: tuple, whole: tuple, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(LayoutRefused, match=f"line 7: .*{message}") as refused:
        lay([5, 1], per_item, whole)
    assert refused.value.rule == 7


def stores(*given: tuple[str, str]) -> tuple[Store, ...]:
    return tuple(
        Store(name("f"), name(key), Flat(order, whole=(PadTo(size("dp")), SplitOver(("dp",)))), 9)
        for key, order in given
    )


def placed(given: tuple[Store, ...], orders: dict[str, list[str]], axis: str = "") -> Placement:
    rules = (
        Rule(name("x"), (split(ext(6), axis),) if axis else (ext(6),)),
        Rule(name("y"), None),
        Rule(name("z"), None),
    )
    model = layout(("dp",), *rules, stores=given)
    return resolve(
        model, parameters={}, mesh={"dp": 2}, shapes={"x": (6,), "y": (1,), "z": (2, 2)}, orders=orders
    )


def test_listed_buffers_come_first_and_the_module_takes_the_rest() -> None:
    placement = placed(stores(("a", "mine"), ("b", "module")), {"mine": ["z", "x"]})
    assert placement.arrays(0) == {"a": (5,), "b": (1,)}
    assert placement.tiles("x").start.tolist() == [4, 0] and placement.tiles("x").arrays == ("a",)
    assert [(f.array, f.start, f.length) for f in placement.fillers(1)] == [("b", 0, 1)]


@pytest.mark.parametrize(
    ("given", "orders", "axis", "message"),
    [
        (stores(("a", "mine")), {}, "", "no order mine was given"),
        (stores(("a", "mine")), {"mine": ["x", "q"]}, "", "names q, which no rule stores"),
        (stores(("a", "mine")), {"mine": ["x", "y"]}, "", "z is in no flat buffer"),
        (
            stores(("a", "mine")),
            {"mine": ["x", "y", "x", "z"]},
            "",
            "x goes into two buffers, or into one twice",
        ),
        (stores(("a", "p"), ("b", "q")), {"p": ["x"], "q": ["x"]}, "", "x goes into two buffers"),
        (stores(("a", "module"), ("b", "module")), {}, "", "two buffers are of the whole module"),
        (stores(("a", "module")), {}, "dp", "dp splits the buffer, and also x"),
        (stores(("a.{zz}", "module")), {}, "", "{zz}, which is no mesh axis"),
    ],
)
def test_buffers_that_do_not_fit_the_arrays_are_refused(
    given: tuple[Store, ...], orders: dict[str, list[str]], axis: str, message: str
) -> None:
    with pytest.raises(LayoutRefused, match=message):
        placed(given, orders, axis)


def test_two_buffers_of_one_name_are_refused() -> None:
    with pytest.raises(LayoutRefused, match="place 0 has two buffers called a"):
        placed(stores(("a", "mine"), ("a", "module")), {"mine": ["x"]}).arrays(0)


def test_a_state_is_in_the_store_that_names_it() -> None:
    given = (
        Store(name("m"), name("model.*")),
        Store(name("o"), name("{state}"), Flat("module", whole=(PadTo(size("dp")), SplitOver(("dp",))))),
    )
    model = layout(
        ("dp",),
        Rule(name("x"), None, (), (rep("dp"),)),
        stores=given,
        states=(("param", "bf16"), ("m", "f32")),
    )
    shapes = {"x": (6,)}
    assert resolve(model, parameters={}, mesh={"dp": 2}, shapes=shapes).arrays(0) == {"x": (6,)}
    assert resolve(model, parameters={}, mesh={"dp": 2}, shapes=shapes, state="m").arrays(0) == {"m": (3,)}
    with pytest.raises(LayoutRefused, match="no state v"):
        resolve(model, parameters={}, mesh={"dp": 2}, shapes=shapes, state="v")
