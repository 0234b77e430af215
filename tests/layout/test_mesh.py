"""Meshes: coordinates, folds, and arithmetic of sizes."""

from __future__ import annotations

import numpy as np
import pytest

from ckptd.errors import LayoutRefused
from ckptd.layout.arithmetic import environment, evaluate, show
from ckptd.layout.expressions import Call, Name, Number, Operation
from ckptd.layout.mesh import Mesh, build

FOLDED = build(
    ("tp", "cp", "dp", "pp"),
    [(("etp", "ep", "edp"), ("tp", "cp", "dp"))],
    {"tp": 2, "cp": 2, "dp": 3, "pp": 2, "etp": 1, "ep": 4},
)


def test_the_first_axis_runs_fastest_and_a_fold_counts_the_same_ranks() -> None:
    assert FOLDED.size == 24 and FOLDED.sizes["edp"] == 3
    seen = set()
    for rank in range(FOLDED.size):
        at = FOLDED.coordinates(rank)
        assert rank == at["tp"] + 2 * at["cp"] + 4 * at["dp"] + 12 * at["pp"]
        assert rank % 12 == at["etp"] + at["ep"] + 4 * at["edp"]
        seen.add((at["etp"], at["ep"], at["edp"], at["pp"]))
        for axis in FOLDED.sizes:
            assert FOLDED.column(axis)[rank] == at[axis]
        assert FOLDED.index(("pp", "ep"), at) == at["pp"] + 2 * at["ep"]
    assert len(seen) == 24


def test_ranks_are_found_by_coordinates() -> None:
    found = FOLDED.where({"pp": 1, "ep": 2})
    assert found.tolist() == [
        r for r in range(24) if FOLDED.coordinates(r)["pp"] == 1 and FOLDED.coordinates(r)["ep"] == 2
    ]
    assert FOLDED.where({"pp": 1}, np.array([3, 20])).tolist() == [20]
    assert FOLDED.indices(("tp", "pp"), np.array([0, 1, 12, 13])).tolist() == [0, 1, 2, 3]


def test_the_basis_takes_the_side_of_a_fold_that_is_used() -> None:
    assert FOLDED.basis(["tp"]) == ("tp", "cp", "dp", "pp")
    assert FOLDED.basis(["ep", "pp"]) == ("etp", "ep", "edp", "pp")
    with pytest.raises(LayoutRefused, match="ep and tp count the same ranks in two ways"):
        FOLDED.basis(["ep", "tp"])


@pytest.mark.parametrize(
    ("grid", "folds", "sizes", "message"),
    [
        (("tp", "tp"), [], {"tp": 2}, "named twice"),
        (("tp",), [], {}, "no size was given for mesh axis tp"),
        (("tp",), [], {"tp": 0}, "must have at least 1"),
        (("tp",), [], {"tp": 1, "xx": 2}, "has an axis xx"),
        (("tp",), [(("a", "b"), ("tp",))], {"tp": 4, "a": 2, "b": 3}, "= 6 ranks, but tp = 4 ranks"),
        (("tp",), [(("a", "b"), ("tp",))], {"tp": 4, "a": 3}, "3 does not divide the 4 ranks"),
        (("tp",), [(("a",), ("dp",))], {"tp": 4, "a": 3}, "the mesh has no axis dp"),
    ],
)
def test_a_mesh_that_does_not_close_is_refused(grid, folds, sizes, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LayoutRefused, match=message):
        build(grid, folds, sizes)


def test_a_rank_outside_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="rank 4 is not in a mesh of 4"):
        Mesh((("a", 4),)).coordinates(4)


def test_arithmetic() -> None:
    values = {"a": 12, "b": 5}
    a, b = Name("a"), Name("b")
    assert evaluate(Operation("-", Operation("*", a, b), Number(1)), values) == 59
    assert (
        evaluate(Operation("/", a, Number(4)), values) == 3 and evaluate(Operation("+", a, b), values) == 17
    )
    assert [evaluate(Call(f, (a, b)), values) for f in ("lcm", "min", "max", "ceil")] == [60, 5, 12, 3]  # type: ignore[arg-type]
    assert show(Operation("/", a, Call("lcm", (b, Number(2))))) == "(a / lcm(b, 2))"


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (Name("c"), "c has no value"),
        (Operation("/", Name("a"), Name("b")), r"\(a / b\) = 12 / 5 is no whole number"),
        (Operation("/", Name("a"), Number(0)), "is no whole number"),
        (Call("ceil", (Name("a"),)), "wrong number of arguments"),
        (Call("ceil", (Name("a"), Number(0))), "division by 0"),
        (Call("min", ()), "wrong number"),
    ],
)
def test_arithmetic_that_has_no_value_is_refused(expression, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LayoutRefused, match=message):
        evaluate(expression, {"a": 12, "b": 5})


def test_names_get_their_values_in_order() -> None:
    lets = (("x", Operation("*", Name("p"), Name("tp"))), ("y", Operation("+", Name("x"), Number(1))))
    assert environment(("p", "tp"), lets, {"p": 3}, {"tp": 2}) == {"p": 3, "tp": 2, "x": 6, "y": 7}
    for given, message in (
        ({}, "parameter p"),
        ({"p": 1, "q": 1}, "no parameter q"),
        ({"p": 1, "tp": 3}, "tp is 3, but"),
    ):
        with pytest.raises(LayoutRefused, match=message):
            environment(("p", "tp"), lets, given, {"tp": 2})
