"""Writes a tree of objects; `ckptd.image.objects` specifies the text.

Every `run.step()` passes here with hundreds of plain numbers, so homogeneous lists
and dicts of plain values go to the JSON encoder as they are, after checks that run
at the speed of C.  Dispatch is by exact type: a subclass is something else.
"""

from __future__ import annotations

import binascii
import json
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from types import BuiltinFunctionType, FunctionType
from typing import Any, Final

import numpy as np

from ckptd.errors import UnsafeObject
from ckptd.image.tags import (
    ARRAY_DTYPES,
    FACTORIES,
    MAX_ARRAY_BYTES,
    MAX_BYTES,
    MAX_DEPTH,
    MAX_ITEMS,
    PLAIN_INT,
    TAG,
    VERSION,
    TensorRef,
)

_ENCODER: Final = json.JSONEncoder(check_circular=False, allow_nan=False, separators=(",", ":"))
_NEXT: Final = "leave it out of the state, or keep it as numbers, strings, lists, dicts or tensors"
_AS_TENSORS: Final = "keep large data as tensors"


def encode(tree: object) -> bytes:
    """Returns `tree` as bytes.

    Raises:
        UnsafeObject: something in the tree has no safe form, contains itself, or is
            beyond a limit; the message names its path (`scheduler.lr_lambdas[0]`).
    """
    try:
        value = _Encoder().value(tree)
    except _Refused as refused:
        raise UnsafeObject(refused.where(), refused.why, refused.next) from None
    data = _ENCODER.encode({"ckptd.objects": VERSION, "tree": value}).encode("ascii")
    if len(data) > MAX_BYTES:
        why = f"they take {len(data)} bytes, at most {MAX_BYTES} are kept"
        raise UnsafeObject("the objects of this state", why, _AS_TENSORS)
    return data


class _Refused(Exception):
    """Something has no safe form; the path is collected on the way up.  Never leaves this file."""

    def __init__(self, why: str, next: str = _NEXT, target_depth: int | None = None) -> None:
        self.why = why
        self.next = next
        self.target_depth = target_depth  # of a cycle: how deep the container lies that contains itself
        self.reversed_path: list[str] = []

    def where(self) -> str:
        path = self.reversed_path[::-1]
        if self.target_depth is not None:
            self.why += f" (it is {_joined(path[: self.target_depth])} again)"
        return _joined(path)


def _joined(path: Sequence[str]) -> str:
    return "".join(path).removeprefix(".") or "the whole state"


class _Encoder:
    """One walk through one tree."""

    def __init__(self) -> None:
        self.items = 0
        self.active: dict[int, int] = {}  # id of every container around the current value -> its depth

    def value(self, x: Any) -> Any:
        """Returns what the JSON encoder writes for `x`."""
        write = _WRITERS.get(type(x))
        return write(self, x) if write is not None else _foreign(self, x)

    # Every container passes through `enter`, counts its items, and leaves.

    def enter(self, x: Any) -> None:
        known = self.active.get(id(x))
        if known is not None:
            raise _Refused("it contains itself", target_depth=known)
        if len(self.active) >= MAX_DEPTH:
            raise _Refused(f"it lies deeper than {MAX_DEPTH} containers")
        self.active[id(x)] = len(self.active)

    def leave(self, x: Any) -> None:
        del self.active[id(x)]

    def count(self, items: int) -> None:
        self.items += items
        if self.items > MAX_ITEMS:
            raise _Refused(f"the state has more than {MAX_ITEMS} values", _AS_TENSORS)

    def sequence(self, x: Any) -> Any:
        """Returns the elements of `x`; `x` itself where the JSON encoder can write them as they are."""
        self.count(len(x))
        if _is_plain(x):
            return list(x) if type(x) is deque else x
        self.enter(x)
        out = []
        try:
            for element in x:
                out.append(self.value(element))
        except _Refused as refused:
            refused.reversed_path.append(f"[{len(out)}]")
            raise
        self.leave(x)
        return out

    def mapping(self, x: dict[Any, Any]) -> Any:
        if TAG in x or not _are_plain_texts(x):
            return {TAG: "dict", "v": self.pairs(x)}
        self.count(2 * len(x))
        if _is_plain(x.values()):
            return x
        self.enter(x)
        out = {}
        key = None
        try:
            for key, element in x.items():
                out[key] = self.value(element)
        except _Refused as refused:
            refused.reversed_path.append(_key_path(key))
            raise
        self.leave(x)
        return out

    def pairs(self, x: dict[Any, Any]) -> list[list[Any]]:
        """Returns the items of a dict as [key, value] pairs, in their order."""
        self.count(2 * len(x))
        self.enter(x)
        out = []
        key = None
        try:
            for key, element in x.items():
                out.append([self.value(key), self.value(element)])
        except _Refused as refused:
            refused.reversed_path.append(_key_path(key))
            raise
        self.leave(x)
        return out


def _is_plain(elements: Iterable[Any]) -> bool:
    """Whether the JSON encoder writes all `elements`, of one type, as `value` would."""
    kinds = set(map(type, elements))
    if not kinds:
        return True
    if len(kinds) > 1:
        return kinds <= _SINGLETONS
    kind = kinds.pop()
    if kind is int:
        return bool(min(elements) > -PLAIN_INT and max(elements) < PLAIN_INT)
    if kind is float:
        return all(map(isfinite, elements))
    if kind is str:
        return all(map(str.isascii, elements))
    return kind in _SINGLETONS


_SINGLETONS: Final = frozenset({bool, type(None)})


def _are_plain_texts(keys: dict[Any, Any]) -> bool:
    kinds = set(map(type, keys))
    return not kinds or (kinds == {str} and (all(map(str.isascii, keys)) or all(map(_is_unicode, keys))))


def _is_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogates, which JSON cannot always tell from pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _itself(_: _Encoder, x: Any) -> Any:
    return x


def _int(_: _Encoder, x: int) -> Any:
    # Decimal conversion is quadratic, and Python refuses it from 4,300 digits on.
    return x if -PLAIN_INT < x < PLAIN_INT else {TAG: "int", "v": hex(x)}


def _float(_: _Encoder, x: float) -> Any:
    return x if isfinite(x) else {TAG: "float", "v": struct.pack(">d", x).hex()}


def _str(_: _Encoder, x: str) -> Any:
    if x.isascii() or _is_unicode(x):
        return x
    return {TAG: "str", "v": _base64(x.encode("utf-8", "surrogatepass"))}


def _bytes(_: _Encoder, x: bytes | bytearray) -> Any:
    if len(x) > MAX_BYTES:
        raise _Refused(f"{len(x)} bytes are too many, at most {MAX_BYTES} are kept", _AS_TENSORS)
    return {TAG: type(x).__name__, "v": _base64(x)}


def _complex(_: _Encoder, x: complex) -> Any:
    return {TAG: "complex", "v": struct.pack(">dd", x.real, x.imag).hex()}


def _list(e: _Encoder, x: list[Any]) -> Any:
    return e.sequence(x)


def _tuple(e: _Encoder, x: tuple[Any, ...]) -> Any:
    return {TAG: "tuple", "v": e.sequence(x)}


def _set(e: _Encoder, x: set[Any] | frozenset[Any]) -> Any:
    # Sets have no order of their own, and equal states have equal bytes.
    elements = e.sequence(list(x))
    return {TAG: type(x).__name__, "v": sorted(elements, key=_ENCODER.encode)}


def _deque(e: _Encoder, x: deque[Any]) -> Any:
    return {TAG: "deque", "v": e.sequence(x), "n": x.maxlen}


def _dict(e: _Encoder, x: dict[Any, Any]) -> Any:
    return e.mapping(x)


def _named_dict(e: _Encoder, x: dict[Any, Any]) -> Any:
    return {TAG: type(x).__name__, "v": e.pairs(x)}


def _defaultdict(e: _Encoder, x: defaultdict[Any, Any]) -> Any:
    factory = x.default_factory
    if factory is not None and factory not in FACTORIES.values():
        known = ", ".join(FACTORIES)
        raise _Refused(f"its default factory is {_described(factory)}, and only these are safe: {known}")
    return {TAG: "defaultdict", "v": e.pairs(x), "f": None if factory is None else factory.__name__}


def _array(e: _Encoder, x: np.ndarray[Any, Any]) -> Any:
    if x.dtype.str not in ARRAY_DTYPES:
        raise _Refused(f"a numpy array of dtype {x.dtype} has no safe form")
    if x.nbytes > MAX_ARRAY_BYTES:
        raise _Refused(
            f"a numpy array of {x.nbytes} bytes is too large, at most {MAX_ARRAY_BYTES} are kept here",
            _AS_TENSORS,
        )
    e.count(x.ndim)
    return {TAG: "array", "d": x.dtype.str, "s": x.shape, "v": _base64(x.tobytes())}


def _tensor_ref(_: _Encoder, x: TensorRef) -> Any:
    return {TAG: "tensor", "v": x.name}


def _foreign(e: _Encoder, x: Any) -> Any:
    """Returns the value of what is not in the table, or refuses it without calling any code of its own."""
    kind = type(x)
    if issubclass(kind, np.generic):
        if x.dtype.str not in ARRAY_DTYPES:
            raise _Refused(f"a numpy {kind.__name__} of dtype {x.dtype} has no safe form")
        return {TAG: "scalar", "d": x.dtype.str, "v": _base64(x.tobytes())}
    # By name, since this package does not import torch.
    if issubclass(kind, tuple) and kind.__module__ == "torch" and kind.__name__ == "Size":
        return _tuple(e, tuple(x))
    raise _refused(x)


def _refused(x: object) -> _Refused:
    base = next((known for known in _WRITERS if issubclass(type(x), known)), None)
    if base is not None:
        why = f"{_described(x)} is not a plain {base.__name__}, and would come back as one"
        return _Refused(why, f"convert it with {base.__name__}(...), or leave it out of the state")
    return _Refused(f"{_described(x)} has no safe form")


def _described(x: Any) -> str:
    """Returns what `x` is, without calling any code of its own."""
    kind = type(x)
    what = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    return f"the {what} {x.__qualname__}" if kind in _NAMED else f"an object of type {what}"


_NAMED: Final = frozenset({FunctionType, BuiltinFunctionType, type})  # their names are plain attributes


def _key_path(key: object) -> str:
    if type(key) is str:
        return f".{key}" if key.isidentifier() else f"[{key[:80]!a}]"
    # The text of a huge int is refused by Python itself.
    if key is None or type(key) in {bool, float} or (type(key) is int and key.bit_length() <= 64):
        return f"[{key}]"
    return f"[a key of type {type(key).__qualname__}]"


def _base64(data: bytes | bytearray) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


_WRITERS: Final[dict[type, Callable[[_Encoder, Any], Any]]] = {
    type(None): _itself,
    bool: _itself,
    int: _int,
    float: _float,
    str: _str,
    bytes: _bytes,
    bytearray: _bytes,
    complex: _complex,
    list: _list,
    tuple: _tuple,
    set: _set,
    frozenset: _set,
    deque: _deque,
    dict: _dict,
    OrderedDict: _named_dict,
    Counter: _named_dict,
    defaultdict: _defaultdict,
    np.ndarray: _array,
    TensorRef: _tensor_ref,
}
