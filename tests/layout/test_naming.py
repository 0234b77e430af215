"""Name indices, patterns and claims."""

from __future__ import annotations

import pytest
from layout_oracle import ext, layout, name, rep, total

from ckptd.errors import LayoutRefused
from ckptd.layout.expressions import Index, Number, Rule
from ckptd.layout.naming import fill, index_range, indices, logical, match, show, wilds
from ckptd.layout.resolve import resolve

VALUES = {"l": 7, "pp": 2, "vp": 2, "e": 4}


def test_a_share_is_numbered_from_start_and_the_last_may_be_short() -> None:
    found = index_range(Index("l", ("pp",), Number(1)), VALUES, {"pp": 2})
    assert [at["pp"] for at in found.holders] == [0, 0, 0, 0, 1, 1, 1]
    assert found.local == (1, 2, 3, 4, 1, 2, 3)


def test_a_place_holds_all_its_virtual_stages_one_after_another() -> None:
    found = index_range(Index("l", ("pp", "vp")), {**VALUES, "l": 8}, {"pp": 2})
    assert [at["pp"] for at in found.holders] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert found.local == (0, 1, 0, 1, 2, 3, 2, 3)


def test_without_a_grid_every_place_holds_all_and_widths_say_otherwise() -> None:
    assert index_range(Index("e"), VALUES, {"pp": 2}).holders == ({}, {}, {}, {})
    found = index_range(Index("e", ("pp",), widths=(1, 3)), VALUES, {"pp": 2})
    assert [at["pp"] for at in found.holders] == [0, 1, 1, 1] and found.local == (0, 0, 1, 2)


def test_names_are_filled_and_matched() -> None:
    pattern = name("a.{l}.x{e:02}.*.w")
    assert [index.id for index in indices(pattern)] == ["l", "e"] and wilds(pattern) == 1
    assert fill(pattern, {"l": 3, "e": 1}, ("q",)) == "a.3.x01.q.w"
    assert show(pattern) == "a.{l}.x{e}.*.w"
    names = ["a.3.x01.q.w", "a.3.x1.q.w", "a.9.x01.q.w", "a.03.x01.q.w", "a.3.x01.q.w2", "a.0.x02.q.r.w"]
    assert list(match(pattern, names, VALUES)) == [({"l": 3, "e": 1}, ("q",)), ({"l": 0, "e": 2}, ("q.r",))]
    with pytest.raises(LayoutRefused, match=r"\{e\} has no value here"):
        fill(pattern, {"l": 1})


def test_an_index_that_counts_from_one_and_one_that_stands_twice() -> None:
    pattern = (*name("b."), Index("l", start=Number(1)), *name(".c.{l}"))
    assert logical((Index("l", start=Number(1)),), {"l": 0}, (), VALUES) == "1"
    assert list(match(pattern, ["b.1.c.0", "b.2.c.2", "b.7.c.6"], VALUES)) == [({"l": 0}, ()), ({"l": 6}, ())]


def test_the_arrays_of_a_block_follow_one_another() -> None:
    shapes = {f"{kind}.{n}": (2,) for kind in "xy" for n in range(3)} | {
        f"m.{n}.e.{k}.{w}": (1,) for n in range(2) for w in "uv" for k in range(2)
    }
    model = layout(
        ("dp",),
        Rule(name("L.{l}.x"), None, (name("x.{l}"),), (rep("dp"),)),
        Rule(name("L.{l}.y"), None, (name("y.{l}"),), (rep("dp"),)),
        Rule(name("M.{m}.E.{k}.u"), None, (name("m.{m}.e.{k}.u"),), (rep("dp"),)),
        Rule(name("M.{m}.E.{k}.v"), None, (name("m.{m}.e.{k}.v"),), (rep("dp"),)),
        parameters=("l", "m", "k"),
    )
    placement = resolve(model, parameters={"l": 3, "m": 2, "k": 2}, mesh={"dp": 1}, shapes=shapes)
    assert list(placement.arrays(0)) == [f"L.{n}.{k}" for n in range(3) for k in "xy"] + [
        f"M.{m}.E.{k}.{w}" for m in range(2) for k in range(2) for w in "uv"
    ]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(name("a.{zz}"), None), "zz has no value"),
        (Rule(name("a.*"), None, (name("x"),)), "different numbers of"),
        (Rule(name("a.{l}.*"), None, (name("*"),)), "must be in its pieces"),
        (Rule(name("a"), None, (name("x.{l}"),)), "neither of the name a nor a dimension"),
        (Rule(name("a"), (total(p=1, q=1),), (name("x.0"),)), "2 summands and 1 pieces"),
        (Rule(name("a.{l}"), None, (name("x.{l}"),)), r"needs the logical tensor x\.3, which does not exist"),
        (Rule(name("a.{l}"), (ext(2),), (name("x.0"),)), r"x\.0 is claimed twice, by line 1"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(rule: Rule, message: str) -> None:
    shapes = {f"x.{n}": (2,) for n in range(3)}
    with pytest.raises(LayoutRefused, match=message):
        resolve(layout(("dp",), rule, parameters=("l",)), parameters={"l": 5}, mesh={"dp": 1}, shapes=shapes)


def test_a_rule_that_finds_nothing_is_idle() -> None:
    model = layout(("dp",), Rule(name("bias"), None), Rule(name("*"), None))
    placement = resolve(model, parameters={}, mesh={"dp": 1}, shapes={"w": (2,)})
    assert placement.claims.idle == (0,)
