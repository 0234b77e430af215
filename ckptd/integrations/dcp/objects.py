"""What is no tensor: DCP's flat items on one side, the values of a universal checkpoint on the other.

DCP takes every dict apart: `{"scheduler": {"last_epoch": 3}}` is the item `scheduler.last_epoch`.
`ckptd.save` keeps what holds no tensor whole: the value `scheduler`.  Checkpoints hold the second form,
whoever wrote them, and beside it what DCP needs to know (`Record`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ckptd.client.attached import RESERVED
from ckptd.client.state import FORMAT
from ckptd.errors import CorruptCheckpoint, InvalidRequest, UnsafeObject
from ckptd.image import TensorRef, decode, encode

Path = tuple[str | int, ...]  # dict keys and list indices
_RECORD: Final = "dcp"
_OPTIMIZER: Final = {"groups", "state", "other"}  # of an optimizer that `ckptd.save` was given as such
_TENSOR: Final = object()  # stands for a tensor in a tree


@dataclass(frozen=True)
class Record:
    """What a planner knew of its items."""

    items: tuple[str, ...]  # names of the items that are no tensors
    paths: Mapping[str, Path] | None  # of every item in the nested state; None: the planner did not flatten


def encode_object(name: str, value: object) -> str:
    """Returns one item as text.

    Raises:
        UnsafeObject: it has no safe form; the message names the item.
    """
    try:
        return encode(value).decode("ascii")
    except UnsafeObject as error:
        what = name if error.what == "the whole state" else f"{name}: {error.what}"
        raise UnsafeObject(what, error.why, "leave it out of the state, or make it numbers") from error


def encode_tree(items: Mapping[str, str], tensors: Iterable[str], planner_data: object) -> bytes:
    """Returns all objects of a checkpoint, encoded as `ckptd.save` does.

    Args:
        items: by name, as `encode_object` gave them.
        tensors: names of the items that are tensors.
        planner_data: DCP's mapping of names to paths, or None.

    Raises:
        InvalidRequest: the planner's data is something else.
        UnsafeObject: all objects together are beyond a limit.
    """
    paths = _paths(planner_data)
    # DCP spreads equal items over the ranks; the planner's order is that of the state.
    ordered = dict.fromkeys([*(name for name in paths or () if name in items), *items])
    objects = {name: decode(items[name].encode("ascii")) for name in ordered}
    record = {"items": list(objects), "paths": paths}
    own = {"format": FORMAT, "values": _values(objects, tensors, paths), _RECORD: record}
    return encode({RESERVED: own})


def items_of(tree: object) -> tuple[dict[str, Any], Record]:
    """Returns the items of a stored tree by DCP's names, and what DCP's planner needs to know.

    A value that is a `TensorRef` is no item: it is a tensor of that name.

    Raises:
        CorruptCheckpoint: these are not the objects of a state.
    """
    own = {} if tree is None else tree.get(RESERVED, {}) if isinstance(tree, dict) else None
    if not isinstance(own, dict) or not isinstance(own.get("values", {}), dict):
        raise _not_ours("the objects of this checkpoint are not a state")
    values = dict(own.get("values", {}))
    for name, kept in tree.items() if isinstance(tree, dict) else ():
        if name != RESERVED and not (isinstance(kept, dict) and kept.keys() == _OPTIMIZER):
            values[name] = kept
    leaves = {name: leaf for key, value in values.items() for name, leaf in _leaves(str(key), value)}
    flat = {**values, **leaves}
    if _RECORD in own:
        return flat, _record(own[_RECORD], flat)
    return flat, Record(tuple(n for n, leaf in leaves.items() if not isinstance(leaf, TensorRef)), None)


def _record(given: Any, flat: Mapping[str, Any]) -> Record:
    items, paths = (given.get("items"), given.get("paths")) if isinstance(given, dict) else (None, None)
    if not isinstance(items, list) or not flat.keys() >= set(items):
        raise _not_ours("the objects of this checkpoint are not those that DCP saved")
    try:
        return Record(tuple(items), _paths(paths))
    except InvalidRequest as error:
        raise _not_ours("the paths of this checkpoint's items cannot be used") from error


def _not_ours(what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(what, next="use another checkpoint")


def _paths(given: object) -> Mapping[str, Path] | None:
    if given is None:
        return None
    if isinstance(given, dict) and all(
        type(name) is str and type(path) is tuple and path and all(type(key) in (str, int) for key in path)
        for name, path in given.items()
    ):
        return given
    raise InvalidRequest(
        "this planner's data cannot be kept",
        f"it is a {type(given).__name__}, expected names and their paths, as DefaultSavePlanner gives them",
        "use a planner that leaves planner_data as it is",
    )


def _values(
    objects: Mapping[str, Any], tensors: Iterable[str], paths: Mapping[str, Path] | None
) -> dict[str, Any]:
    """The objects as `ckptd.save` would name them: taken apart only on the way to a tensor."""
    root: dict[str | int, Any] = {}
    for name in tensors:
        _put(root, (paths or {}).get(name, (name,)), _TENSOR)
    for name, value in objects.items():
        _put(root, (paths or {}).get(name, (name,)), value)
    found: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if value is not _TENSOR and not _holds_tensor(value):
                found[f"{prefix}{key}"] = value
            elif value is not _TENSOR:
                walk(f"{prefix}{key}.", value)

    walk("", root)
    return found


def _put(root: dict[str | int, Any], path: Path, value: object) -> None:
    """Puts a value at its path; dicts and lists on the way are made."""
    node: Any = root
    for key, following in zip(path, (*path[1:], None), strict=True):
        if isinstance(node, list):
            assert isinstance(key, int)
            node.extend([None] * (key + 1 - len(node)))
            if following is not None and node[key] is None:
                node[key] = [] if isinstance(following, int) else {}
        elif following is not None:
            node.setdefault(key, [] if isinstance(following, int) else {})
        if following is None:
            node[key] = value
        else:
            node = node[key]


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(_holds_tensor(item) for item in (value.values() if isinstance(value, dict) else value))
    return value is _TENSOR


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The items into which DCP takes a value apart (`torch.distributed.checkpoint._traverse`)."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    elif isinstance(value, list) and not _is_terminal(value):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}.{index}", item)
    else:
        yield name, value


def _is_terminal(values: list[Any]) -> bool:
    return not any(
        isinstance(item, (Mapping, TensorRef)) or (isinstance(item, list) and not _is_terminal(item))
        for item in values
    )
