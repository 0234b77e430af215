"""Confirmation by references: what may be called confirmed, what is contradicted, and what stays unknown."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from ckptd.errors import LayoutRefused
from ckptd.layout.confirm import Confirmation, Reference, confirm, judge, recorded, second
from ckptd.layout.fingerprint import fingerprint
from ckptd.layout.language import parse
from ckptd.layout.resolve import Placement, resolve
from ckptd.layout.sums import merge, read_sums

Arrays = dict[tuple[int, str], NDArray[np.generic]]
rng = np.random.default_rng(20261121)


def placed(rules: str, mesh: dict[str, int], **shapes: tuple[int, ...]) -> Placement:
    text = f"layout x {{ mesh {' * '.join(mesh)}\n {rules} }}"
    return resolve(parse(text), parameters={}, mesh=mesh, shapes=shapes)


def reading(arrays: Arrays) -> Callable[[int, str], NDArray[np.generic]]:
    return lambda place, name: arrays[place, name].reshape(-1)


def manifest(**tensors: NDArray[np.generic]) -> Reference:
    return recorded(
        "the manifest",
        {name: fingerprint(array) for name, array in tensors.items()},
        shapes={name: array.shape for name, array in tensors.items()},
        widths={name: array.itemsize for name, array in tensors.items()},
    )


def replicated(*copies: NDArray[np.generic]) -> tuple[Placement, Arrays]:
    placement = placed("w : [...] rep dp", {"dp": len(copies)}, w=copies[0].shape)
    return placement, {(rank, "w"): copy for rank, copy in enumerate(copies)}


W = rng.standard_normal((4, 4)).astype(np.float32)


def test_replicas_that_differ_are_named_and_never_confirmed() -> None:
    other = W.copy()
    other[3, 1] += 1
    placement, arrays = replicated(W, W, other)
    found = confirm(placement, reading(arrays), [manifest(w=W)])
    assert not found.confirmed and [one.tensor for one in found.contradicted] == ["w"]
    assert found.contradicted[0].cover == 2 and found.contradicted[0].found == fingerprint(other)
    (difference,) = found.differing
    assert difference.fingerprints == {0: fingerprint(W), 1: fingerprint(W), 2: fingerprint(other)}
    assert difference.places == {0: (0,), 1: (1,), 2: (2,)}
    assert "the replicas of w differ" in str(found)
    alone = confirm(placement, reading(arrays), [])
    assert alone.differing == (difference,) and alone.unconfirmed == {"w": "no reference"}
    one = confirm(placement, reading(arrays), [manifest(w=W)], every_replica=False)
    assert one.confirmed == {"w"} and not one.differing
    assert not second("itself", placement, reading(arrays)).tensors, (
        "one that differs from itself says nothing"
    )


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"a": np.zeros((3, 2), np.float32), "b": W}, "all its elements are equal"),
        ({"a": np.full(5, np.nan), "b": W}, "all its elements are equal"),
        ({"a": np.full(5, 1 + 2j), "b": W}, "all its elements are equal"),
        ({"a": W, "b": W.copy()}, "it equals another tensor: b"),
        ({"a": np.float32(7), "b": np.float32(7)}, "it equals another tensor: b"),
        ({"a": np.float32(7), "b": W}, ""),
        ({"a": np.array([0.0, -0.0]), "b": W}, ""),
        ({"a": np.array([1 + 2j, 1 + 3j]), "b": W}, ""),
    ],
)
def test_equality_that_a_wrong_layout_would_give_as_well_confirms_nothing(
    tensors: dict[str, NDArray[np.generic]], why: str
) -> None:
    whole = {name: np.asarray(array) for name, array in tensors.items()}
    placement = placed("* : [...]", {"one": 1}, **{name: array.shape for name, array in whole.items()})
    arrays: Arrays = {(0, name): array for name, array in whole.items()}
    found = confirm(placement, reading(arrays), [manifest(**whole)])
    assert not found.contradicted
    assert found.unconfirmed.get("a", "") == why and ("a" in found.confirmed) == (not why)


def test_a_constant_is_seen_across_the_boxes_of_many_places() -> None:
    placement = placed("w : [_@dp]", {"dp": 2}, w=(4,))
    for parts, constant in (([1, 1, 1, 1], True), ([1, 1, 2, 2], False)):
        whole = np.array(parts, np.int32)
        arrays: Arrays = {(0, "w"): whole[:2], (1, "w"): whole[2:]}
        found = confirm(placement, reading(arrays), [manifest(w=whole)])
        assert ("w" in found.unconfirmed) == constant


def test_another_dtype_or_shape_is_no_reference() -> None:
    placement, arrays = replicated(W)
    found = confirm(placement, reading(arrays), [manifest(w=W.astype(np.float64))])
    assert found.unconfirmed == {"w": "no reference of this dtype"} and not found.contradicted
    found = confirm(placement, reading(arrays), [manifest(w=W), manifest(w=W.reshape(2, 8))])
    assert not found.confirmed and found.contradicted[0].why == "there its shape is [2, 8], here [4, 4]"


def test_one_reference_that_contradicts_outweighs_those_that_confirm() -> None:
    placement, arrays = replicated(W)
    found = confirm(placement, reading(arrays), [manifest(w=W), manifest(w=W + 1), manifest(other=W)])
    assert not found.confirmed and len(found.contradicted) == 1


def test_tied_dropped_and_averaged_tensors() -> None:
    placement = placed(
        "w : [...] rep dp\n v = v tied w\n d : drop\n m : [...] avg dp\n n : [0] rep dp", {"dp": 2},
        w=(4, 4), v=(4, 4), d=(3,), m=(2,), n=(0,),
    )  # fmt: skip
    arrays: Arrays = {(rank, "w"): W for rank in (0, 1)}
    arrays |= {(rank, "m"): np.array([rank, 5], np.float32) for rank in (0, 1)}
    known = manifest(w=W, v=W, d=np.arange(3), m=np.array([0.5, 5], np.float32), n=np.zeros(0))
    found = confirm(placement, reading(arrays), [known])
    assert found.confirmed == {"w", "v"} and not found.contradicted and not found.differing
    assert found.unconfirmed == {"d": "dropped", "m": "averaged", "n": "no elements"}
    wrong = confirm(placement, reading(arrays), [manifest(w=W, v=W + 1)])
    assert wrong.confirmed == {"w"} and [one.tensor for one in wrong.contradicted] == ["v"]


def test_places_read_apart_and_put_together_are_the_whole() -> None:
    placement = placed(
        "w : [_@tp @dp, ...] rep r\n v : [_, _@dp] rep tp*r", {"tp": 2, "dp": 3, "r": 2}, w=(7, 3), v=(2, 5)
    )
    tensors = {name: rng.standard_normal(placement.shape(name)).astype(np.float32) for name in ("w", "v")}
    arrays: Arrays = {}
    for rank in range(12):
        tp, dp = rank % 2, rank // 2 % 3
        mine = np.array_split(np.arange(7), [4])[tp]
        width = -(-len(mine) // 3)
        arrays[rank, "w"] = tensors["w"][mine[dp * width : (dp + 1) * width]]
        arrays[rank, "v"] = np.ascontiguousarray(tensors["v"][:, dp * 2 : dp * 2 + 2])
    whole = read_sums(placement, reading(arrays))
    apart = [read_sums(placement, reading(arrays), places=[place]) for place in range(12)]
    assert merge(apart) == whole
    known = [manifest(**tensors)]
    assert judge(placement, whole, known).confirmed == {"w", "v"}
    partly = judge(placement, merge(apart[:1]), known)
    assert partly.unconfirmed == dict.fromkeys(("w", "v"), "nothing was read") and not partly.contradicted


def test_arrays_that_do_not_fit() -> None:
    placement, _ = replicated(W)
    with pytest.raises(LayoutRefused, match="w of place 0 has 15 elements, and the layout needs 16"):
        confirm(placement, reading({(0, "w"): W.reshape(-1)[:15]}), [])
    with pytest.raises(ValueError, match="not flat and contiguous"):
        confirm(placement, lambda place, name: W, [])
    halves = placed("w : [_@dp]", {"dp": 2}, w=(4,))
    mixed: Arrays = {(0, "w"): np.zeros(2, np.float32), (1, "w"): np.zeros(2, np.float64)}
    with pytest.raises(ValueError, match="elements of 4 and of 8 bytes"):
        confirm(halves, reading(mixed), [])


def test_the_text_names_numbers_and_tensors() -> None:
    placement = placed("* : [...]", {"one": 1}, a=(4, 4), b=(4, 4), c=(2,))
    arrays: Arrays = {(0, "a"): W.T.copy(), (0, "b"): W + 1, (0, "c"): np.ones(2)}
    found: Confirmation = confirm(placement, reading(arrays), [manifest(a=W, b=W + 1)])
    text = str(found)
    assert text.splitlines()[0] == "x: 1 tensors confirmed by references"
    assert "layout unconfirmed: 1 tensors\n  no reference: c" in text
    assert (
        f"a: the manifest has {fingerprint(W):016x}, and here is " in text
        and "it is stored transposed" in text
    )
    with pytest.raises(LayoutRefused, match="the layout x is contradicted: a: a: the manifest has"):
        found.refuse()
