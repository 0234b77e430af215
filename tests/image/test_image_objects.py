"""Objects: exact round trips in value and type, and clear refusals by path."""

from __future__ import annotations

import enum
import math
import random
import struct
import sys
import time
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import InvalidRequest, UnsafeObject
from ckptd.image import TensorRef, decode, decoding, encode, encoding
from ckptd.image.tags import ARRAY_DTYPES, FACTORIES, MAX_DEPTH


def same(a: Any, b: Any) -> bool:
    """Whether a and b are equal in value and in type, all the way down, NaNs by their bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        if isinstance(a, defaultdict) and a.default_factory is not b.default_factory:
            return False
        return len(a) == len(b) and all(
            same(x, y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True)
        )  # the order of items is part of a dict
    if isinstance(a, list | tuple | deque):
        if isinstance(a, deque) and a.maxlen != b.maxlen:
            return False
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, set | frozenset):
        return sorted(map(encode, a)) == sorted(map(encode, b))
    return bool(a == b)


def arrays() -> st.SearchStrategy[Any]:
    def array(dtype: str, shape: list[int], seed: int) -> Any:
        count = math.prod(shape) * np.dtype(dtype).itemsize
        body = np.random.default_rng(seed).integers(0, 2, count, np.uint8)
        if dtype != "|b1":
            body *= 201
        return np.frombuffer(body.tobytes(), dtype).reshape(shape)

    return st.builds(
        array,
        st.sampled_from(sorted(ARRAY_DTYPES)),
        st.lists(st.integers(0, 3), max_size=3),
        st.integers(0, 999),
    )


# Every code point but single surrogates is in st.text(); those are mixed in.
texts = st.one_of(
    st.text(max_size=8),
    st.text(st.sampled_from('a$\ud800\udc00\udfff\U0001f600"\\\n\0é'), max_size=5),
    st.sampled_from(["$", "v", "", "ckptd.objects"]),
)
hashable_atoms = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), texts, st.binary(max_size=8)
)
atoms = st.one_of(
    hashable_atoms,
    st.floats(),
    st.complex_numbers(),
    st.integers(-(2**1100), 2**1100),
    st.binary(max_size=8).map(bytearray),
    arrays(),
    arrays().filter(lambda a: a.size > 0 and a.dtype.isnative).map(lambda a: a.flat[0]),
    st.builds(TensorRef, st.sampled_from(["a", "layers.0.w"])),
)
keys = st.one_of(
    hashable_atoms, st.tuples(hashable_atoms, hashable_atoms), st.frozensets(st.integers(), max_size=3)
)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(children, max_size=4)
    dicts = st.dictionaries(keys, children, max_size=4)
    return st.one_of(
        lists,
        lists.map(tuple),
        st.builds(
            lambda xs, extra: deque(xs, None if extra is None else len(xs) + extra),
            lists,
            st.sampled_from([None, 0, 3]),
        ),
        st.sets(keys, max_size=4),
        st.dictionaries(texts, children, max_size=4),
        dicts,
        dicts.map(OrderedDict),
        st.builds(defaultdict, st.sampled_from([None, *FACTORIES.values()]), dicts),
        st.dictionaries(keys, st.integers(), max_size=4).map(Counter),
    )


trees = st.recursive(atoms, containers, max_leaves=20)


@settings(deadline=None, derandomize=True, max_examples=250)
@given(trees)
def test_round_trip_is_exact(tree: Any) -> None:
    data = encode(tree)
    assert data.isascii()
    assert same(decode(data), tree)
    assert encode(decode(data)) == data


@pytest.mark.soak
@settings(deadline=None, max_examples=8_000)
@given(trees)
def test_round_trip_is_exact_many_times(tree: Any) -> None:
    assert same(decode(encode(tree)), tree)


EDGES: list[Any] = [
    [0.0, -0.0, 5e-324, -5e-324, sys.float_info.max, 0.1, 1e22, float("inf"), float("-inf"), float("nan")],
    struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0],
    [2**63, -(2**64), 2**1024 - 1, 2**1024, -(2**1024), 1 << 200_000],
    [True, 1, 1.0, None, False, 0],
    [None, 1 << 20_000],
    (True, False, None),
    {1: "int", 2.5: "float", None: "none", "1": "str", (1, (2, "x")): "tuple", b"1": "bytes"},
    {True: 1},
    {"$": "tuple", "v": []},
    {"a": {"$": {"$": 1}}},
    {"ckptd.objects": 1, "tree": {"$": "x"}},
    ["\ud83d\ude00", "\U0001f600", "\ud800", "\udc00\ud800"],
    {"\ud83d\ude00": 1, "\U0001f600": 2},
    {float("inf"): 1, -0.0: 2},
    {0, "a", (1, 2), None, 2.5},
    {"b": 1, "a": 2},
    deque([1, 2, 3], 3),
    deque(["x", 2.5, None]),
    deque(maxlen=0),
    np.zeros((), np.float32),
    np.zeros((0, 3), np.int8),
    np.arange(6, dtype=">i4").reshape(2, 3),
    np.float64(0.1),
    np.bool_(True),
    [],
    (),
    {},
    "",
    b"",
    set(),
]


@pytest.mark.parametrize("tree", EDGES, ids=lambda tree: type(tree).__name__)
def test_edges_round_trip(tree: Any) -> None:
    assert same(decode(encode(tree)), tree)


def test_random_states_of_all_sources_round_trip() -> None:
    states = [
        random.Random(3).getstate(),
        np.random.RandomState(3).get_state(),
        np.random.RandomState(3).get_state(legacy=False),
        torch.Generator().manual_seed(3).get_state().numpy(),
        *(
            kind(3).state
            for kind in (
                np.random.PCG64,
                np.random.PCG64DXSM,
                np.random.Philox,
                np.random.SFC64,
                np.random.MT19937,
            )
        ),
    ]
    for state in states:
        assert same(decode(encode(state)), state)
    twin = np.random.Generator(np.random.PCG64(9))
    source = np.random.Generator(np.random.PCG64(3))
    source.random(7)
    twin.bit_generator.state = decode(encode(source.bit_generator.state))
    assert twin.random() == source.random()


def test_decoded_arrays_may_be_written_and_come_back_in_c_order() -> None:
    fortran = np.asfortranarray(np.arange(6).reshape(2, 3))
    found = decode(encode(fortran))
    assert isinstance(found, np.ndarray)
    found[0, 0] = 9
    assert found.tolist() == [[9, 1, 2], [3, 4, 5]]
    assert decode(encode(np.arange(10)[::3])).tolist() == [0, 3, 6, 9]  # type: ignore[attr-defined]


def test_a_torch_size_becomes_a_tuple() -> None:
    assert same(decode(encode({"shape": torch.Size([2, 3])})), {"shape": (2, 3)})


def test_sets_have_one_text_whatever_their_order() -> None:
    words = [f"w{i}" for i in range(50)]
    backwards: set[str] = set()
    for word in words[::-1]:
        backwards.add(word)
    assert encode(set(words)) == encode(backwards)
    assert encode(frozenset([(1, "a"), (2, "b")])) == encode(frozenset([(2, "b"), (1, "a")]))


def test_one_object_reached_twice_is_no_cycle() -> None:
    shared = [1, "a"]
    assert decode(encode({"x": shared, "y": [shared, shared]})) == {"x": shared, "y": [shared, shared]}


Point = namedtuple("Point", "x y")


class Color(enum.IntEnum):
    RED = 1


class MyDict(dict):  # type: ignore[type-arg]
    pass


class MyStr(str):
    __slots__ = ()


class Explosive:
    """Runs no code of its own when it is refused."""

    def __repr__(self) -> str:
        raise AssertionError("repr was called")

    __str__ = __repr__

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"{name} was looked up")


def cycle() -> Any:
    inner: list[Any] = [1, "a"]
    inner.append({"back": (inner,)})
    return {"scheduler": {"state": inner}}


def nested(depth: int) -> Any:
    tree: Any = 1.5
    for _ in range(depth):
        tree = [tree, "x"]
    return tree


def blowup() -> Any:
    tree: Any = ["a", 1]
    for _ in range(40):
        tree = [tree, tree]
    return tree


REFUSED: dict[str, tuple[Any, str, str]] = {
    "lambda": ({"scheduler": {"lr_lambdas": [lambda e: e]}}, "scheduler.lr_lambdas[0]: ", "the function "),
    "class": ([int], "[0]: ", "the type int"),
    "builtin": ({"f": len}, "f: ", "the builtin_function_or_method len"),
    "object": ({"a": (1, object())}, "a[1]: ", "an object of type object"),
    "explosive": ({"a": {"b": Explosive()}}, "a.b: ", "Explosive"),
    "root": (object(), "the whole state: ", "object"),
    "tensor": ({"a.b": torch.zeros(2)}, "['a.b']: ", "an object of type torch.Tensor"),
    "torch dtype": ({"d": torch.float32}, "d: ", "torch.dtype"),
    "torch device": ({"d": torch.device("cpu")}, "d: ", "torch.device"),
    "namedtuple": ({"p": Point(1, 2)}, "p: ", "not a plain tuple"),
    "IntEnum": ({"c": [0, Color.RED]}, "c[1]: ", "not a plain int"),
    "enum in a tuple of ints": ((1, 2, Color.RED), "[2]: ", "not a plain int"),
    "dict subclass": ({3: MyDict(a=1)}, "[3]: ", "not a plain dict"),
    "str subclass": ({"s": MyStr("x")}, "s: ", "not a plain str"),
    "str subclass as key": ({MyStr("x"): 1}, "[a key of type MyStr]: ", "not a plain str"),
    "object as key": ({(1, Color.RED): 1}, "[a key of type tuple][1]: ", "not a plain int"),
    "UserDict": ([UserDict()], "[0]: ", "UserDict"),
    "generator": ({"g": (i for i in ())}, "g: ", "generator"),
    "object array": ({"a": np.array([object()])}, "a: ", "dtype object"),
    "structured array": ({"a": np.zeros(2, "i4,f4")}, "a: ", "no safe form"),
    "dates": ({"a": np.zeros(2, "M8[s]")}, "a: ", "datetime64"),
    "masked array": ({"a": np.ma.zeros(2)}, "a: ", "not a plain ndarray"),
    "numpy str": ({"a": np.str_("x")}, "a: ", "dtype <U1"),
    "long double": ({"a": np.longdouble(1)}, "a: ", "longdouble"),
    "large array": ({"a": np.zeros((16 << 20) + 1, np.uint8)}, "a: ", "16777217 bytes"),
    "large bytes": ({"a": bytes((64 << 20) + 1)}, "a: ", "67108865 bytes"),
    "large total": ([bytes(60 << 20)], "the objects of this state: ", "at most 67108864"),
    "factory": ({"d": defaultdict(lambda: 0)}, "d: ", "default factory is the function"),
    "unhashable factory": ({"d": defaultdict(np.zeros(1).sum)}, "d: ", "default factory"),
    "counter of objects": (Counter({"a": object()}), "a: ", "object"),  # type: ignore[dict-item]
    "huge key": ({1 << 20_000: object()}, "[a key of type int]: ", "object"),
    "in a deque": (deque([1, object()]), "[1]: ", "object"),
    "cycle": (cycle(), "scheduler.state[2].back[0]: ", "it is scheduler.state again"),
    "too deep": (nested(MAX_DEPTH + 1), "[0]" * MAX_DEPTH, f"deeper than {MAX_DEPTH}"),
    "too many values": ([0.5] * 1_000_001, "the whole state: ", "more than 1000000 values"),
    "blowup": (blowup(), "[0]", "more than 1000000 values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_safe_form_is_refused_by_path(case: str) -> None:
    tree, path, why = REFUSED[case]
    with pytest.raises(UnsafeObject) as caught:
        encode(tree)
    message = str(caught.value)
    assert message.startswith(path)
    assert why in message
    assert ". Next: " in message


def test_the_deepest_allowed_tree_round_trips() -> None:
    tree: Any = {0: {(1, 2): Counter({3: 1})}}
    for _ in range(MAX_DEPTH - 3):
        tree = {1: tree}
    assert same(decode(encode(tree)), tree)


FULL: dict[str, Any] = {
    "arrays": [np.zeros(())] * 1000,
    "arrays of a dim": [np.zeros(1)] * 500,
    "arrays by deques": {i: deque() for i in range(500)},
    "arrays by number": {i: np.zeros(()) for i in range(500)},
    "scalars by complex number": {complex(i, math.inf): np.float32(i) for i in range(500)},
    "deques in deques": [deque([deque()])] * 500,
    "pairs": {i: {} for i in range(500)},
    "factories": [defaultdict(int)] * 1000,
}


@pytest.mark.parametrize("case", FULL)
def test_what_has_the_largest_allowed_number_of_values_is_read(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader's bound on JSON marks never refuses what the writer's bound on values lets pass."""
    monkeypatch.setattr(encoding, "MAX_ITEMS", 1000)
    monkeypatch.setattr(decoding, "_MAX_JSON_MARKS", decoding._MAX_JSON_MARKS // 1000)
    assert same(decode(encode(FULL[case])), FULL[case])
    with pytest.raises(UnsafeObject, match="more than 1000 values"):
        encode([FULL[case]])


def test_a_reference_holds_a_usable_name() -> None:
    for name in ("", "__ckptd.variable", "a\n"):
        with pytest.raises(InvalidRequest):
            TensorRef(name)


def test_what_every_step_encodes_takes_under_a_millisecond() -> None:
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "foreach": None, "params": list(range(200))}
    tree = {
        "python": random.Random(1).getstate(),
        "numpy": np.random.RandomState(1).get_state(),
        "torch": torch.Generator().manual_seed(1).get_state().numpy().tobytes(),
        "groups": [group, dict(group)],
    }
    best = math.inf
    for _ in range(30):
        started = time.perf_counter()
        encode(tree)
        best = min(best, time.perf_counter() - started)
    print(f"encode: {best * 1e6:.0f} us")
    assert best < 2e-3  # twice the target: other tests share the machine
