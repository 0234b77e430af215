"""Reads a tree of objects; `ckptd.image.objects` specifies the text.

The bytes may come from anywhere: length, depth and number of values are bounded
before the JSON decoder sees them, and every tag checks what it was given.
"""

from __future__ import annotations

import binascii
import json
import math
import re
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, Final, NoReturn

import numpy as np

from ckptd.errors import CorruptImage, InvalidRequest
from ckptd.image.tags import (
    ARRAY_DTYPES,
    FACTORIES,
    MAX_ARRAY_BYTES,
    MAX_ARRAY_DIMS,
    MAX_BYTES,
    MAX_DEPTH,
    MAX_ITEMS,
    TAG,
    VERSION,
    TensorRef,
)

# A container takes at most three JSON levels (tag, list, pair), a value in it two more.
_MAX_JSON_DEPTH: Final = 4 * MAX_DEPTH
# A dict's item, which counts as two values, takes at most 13 of the characters [ { , (two arrays in a pair).
_MAX_JSON_MARKS: Final = 7 * MAX_ITEMS
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_MARKS_ONLY: Final = bytes(sorted(set(range(256)) - set(b"[]{},")))
_FLOAT: Final = re.compile(r"[0-9a-f]{16}")
_COMPLEX: Final = re.compile(r"[0-9a-f]{32}")
_INT: Final = re.compile(r"-?0x[0-9a-f]+")


def decode(data: bytes | bytearray | memoryview) -> object:
    """Returns the tree that `encode` was given; tensors as `TensorRef`.

    Raises:
        CorruptImage: these are not bytes that `encode` wrote, or they are beyond a limit.
    """
    if len(data) > MAX_BYTES:
        _fail(f"they take {len(data)} bytes, at most {MAX_BYTES} are read")
    text = bytes(data)
    _check_bounds(text)
    try:
        whole = json.loads(text.decode("ascii"), object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        _fail(f"the JSON cannot be read: {error}", error)
    if type(whole) is not dict or set(whole) != {"ckptd.objects", "tree"}:
        _fail('expected {"ckptd.objects":1,"tree":...}')
    if whole["ckptd.objects"] != VERSION or type(whole["ckptd.objects"]) is not int:
        _fail(f"found version {whole['ckptd.objects']!r}, expected {VERSION}")
    return _value(whole["tree"])


def _check_bounds(text: bytes) -> None:
    marks = np.frombuffer(_STRING.sub(b"", text).translate(None, _MARKS_ONLY), np.uint8)
    opens = (marks == ord("[")) | (marks == ord("{"))
    closes = (marks == ord("]")) | (marks == ord("}"))
    if marks.size - np.count_nonzero(closes) > _MAX_JSON_MARKS:
        _fail(f"they hold more than {MAX_ITEMS} values")
    deepest = int(np.cumsum(opens.astype(np.int64) - closes).max(initial=0))
    if deepest > _MAX_JSON_DEPTH:
        _fail(f"they are nested {deepest} deep, at most {_MAX_JSON_DEPTH} is read")


def _fail(why: str, cause: Exception | None = None) -> NoReturn:
    raise CorruptImage(
        "the objects of this image cannot be read", why, "recover it from another copy, or from parity"
    ) from cause


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        _fail("a JSON object has a key twice")
    return found


def _constant(name: str) -> NoReturn:
    _fail(f"found {name}, which is not JSON")


def _value(x: Any) -> Any:
    kind = type(x)
    if kind is list:
        return [_value(element) for element in x]
    if kind is dict:
        return _tagged(x) if TAG in x else {key: _value(element) for key, element in x.items()}
    if kind is float and not math.isfinite(x):
        _fail("a number is beyond the range of a double")
    return x


def _tagged(x: dict[str, Any]) -> Any:
    tag = x[TAG]
    reader = _READERS.get(tag) if type(tag) is str else None
    if reader is None:
        _fail(f"the tag {ascii(tag)[:80]} is unknown")
    keys, read = reader
    if x.keys() != keys:
        _fail(f"the tag {tag!r} has the keys {ascii(sorted(x))[:200]}, expected {sorted(keys)}")
    return read(x)


def _list(x: dict[str, Any]) -> list[Any]:
    if type(x["v"]) is not list:
        _fail(f"the tag {x[TAG]!r} holds no list")
    return [_value(element) for element in x["v"]]


def _elements(kind: type) -> Callable[[dict[str, Any]], Any]:
    """Returns the reader of a set's elements, which are hashable and differ."""

    def read(x: dict[str, Any]) -> Any:
        elements = _list(x)
        try:
            found = kind(elements)
        except TypeError as error:
            _fail(f"an element of a {kind.__name__} cannot be one: {error}", error)
        if len(found) != len(elements):
            _fail(f"a {kind.__name__} has an element twice")
        return found

    return read


def _items(kind: type) -> Callable[[dict[str, Any]], Any]:
    """Returns the reader of a dict of this kind, given as pairs."""

    def read(x: dict[str, Any]) -> Any:
        return _filled(kind(), x)

    return read


def _filled(into: dict[Any, Any], x: dict[str, Any]) -> dict[Any, Any]:
    pairs = x["v"]
    if type(pairs) is not list or any(type(pair) is not list or len(pair) != 2 for pair in pairs):
        _fail(f"the tag {x[TAG]!r} holds no list of pairs")
    for key, element in pairs:
        try:
            into[_value(key)] = _value(element)
        except TypeError as error:
            _fail(f"a key of a dict cannot be one: {error}", error)
    if len(into) != len(pairs):
        _fail("a dict has a key twice")
    return into


def _defaultdict(x: dict[str, Any]) -> Any:
    name = x["f"]
    if name is not None and (type(name) is not str or name not in FACTORIES):
        _fail(f"the default factory {ascii(name)[:80]} is unknown")
    return _filled(defaultdict(None if name is None else FACTORIES[name]), x)


def _deque(x: dict[str, Any]) -> Any:
    elements, maxlen = _list(x), x["n"]
    if maxlen is not None and (type(maxlen) is not int or not len(elements) <= maxlen < 1 << 62):
        _fail(f"a deque of {len(elements)} elements has the maximal length {ascii(maxlen)[:80]}")
    return deque(elements, maxlen)


def _text(x: dict[str, Any], pattern: re.Pattern[str]) -> str:
    text = x["v"]
    if type(text) is not str or pattern.fullmatch(text) is None:
        _fail(f"the tag {x[TAG]!r} holds {ascii(text)[:80]}")
    return text


def _float(x: dict[str, Any]) -> float:
    value: float = struct.unpack(">d", bytes.fromhex(_text(x, _FLOAT)))[0]
    return value


def _int(x: dict[str, Any]) -> int:
    return int(_text(x, _INT), 16)


def _complex(x: dict[str, Any]) -> complex:
    return complex(*struct.unpack(">dd", bytes.fromhex(_text(x, _COMPLEX))))


def _bytes(x: dict[str, Any]) -> bytes:
    try:
        return binascii.a2b_base64(x["v"], strict_mode=True)
    except (ValueError, TypeError) as error:
        _fail(f"the tag {x[TAG]!r} holds no base64: {error}", error)


def _str(x: dict[str, Any]) -> str:
    try:
        return _bytes(x).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        _fail(f"a string cannot be read: {error}", error)


def _dtype(x: dict[str, Any]) -> np.dtype[Any]:
    # np.dtype reads a small language of its own; only known words reach it.
    if type(x["d"]) is not str or x["d"] not in ARRAY_DTYPES:
        _fail(f"the numpy dtype {ascii(x['d'])[:80]} is unknown")
    return np.dtype(x["d"])


def _array(x: dict[str, Any]) -> Any:
    dtype, shape, data = _dtype(x), x["s"], _bytes(x)
    if type(shape) is not list or any(type(size) is not int or size < 0 for size in shape):
        _fail(f"a numpy array has the shape {ascii(shape)[:200]}")
    if len(shape) > MAX_ARRAY_DIMS:
        _fail(f"a numpy array has {len(shape)} dims, at most {MAX_ARRAY_DIMS} are read")
    # Dims of 0 are passed over for the limit, since numpy multiplies without them, too.
    if math.prod(filter(None, shape)) * dtype.itemsize > MAX_ARRAY_BYTES:
        _fail(f"a numpy array of shape {ascii(shape)[:200]} takes more than {MAX_ARRAY_BYTES} bytes")
    if math.prod(shape) * dtype.itemsize != len(data):
        _fail(f"a numpy array of {dtype} and shape {shape} has {len(data)} bytes")
    return np.frombuffer(bytearray(data), dtype).reshape(shape)


def _scalar(x: dict[str, Any]) -> Any:
    dtype, data = _dtype(x), _bytes(x)
    if len(data) != dtype.itemsize:
        _fail(f"a numpy {dtype} has {len(data)} bytes")
    # Scalars have no byte order of their own: numpy's are native.
    return np.frombuffer(data, dtype)[0]


def _tensor(x: dict[str, Any]) -> TensorRef:
    if type(x["v"]) is not str:
        _fail("a tensor has no name")
    try:
        return TensorRef(x["v"])
    except InvalidRequest as error:
        _fail(f"{error.what}, since {error.why}", error)


_PLAIN: Final = frozenset({TAG, "v"})

# Of each tag: all its keys, and what reads it.
_READERS: Final[dict[str, tuple[frozenset[str], Callable[[dict[str, Any]], Any]]]] = {
    "float": (_PLAIN, _float),
    "int": (_PLAIN, _int),
    "str": (_PLAIN, _str),
    "bytes": (_PLAIN, _bytes),
    "bytearray": (_PLAIN, lambda x: bytearray(_bytes(x))),
    "complex": (_PLAIN, _complex),
    "tuple": (_PLAIN, lambda x: tuple(_list(x))),
    "set": (_PLAIN, _elements(set)),
    "frozenset": (_PLAIN, _elements(frozenset)),
    "deque": (_PLAIN | {"n"}, _deque),
    "dict": (_PLAIN, _items(dict)),
    "OrderedDict": (_PLAIN, _items(OrderedDict)),
    "Counter": (_PLAIN, _items(Counter)),
    "defaultdict": (_PLAIN | {"f"}, _defaultdict),
    "array": (_PLAIN | {"d", "s"}, _array),
    "scalar": (_PLAIN | {"d"}, _scalar),
    "tensor": (_PLAIN, _tensor),
}
