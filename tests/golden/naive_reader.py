"""A second reader of checkpoints, written from docs/format.md alone: it is slow, obvious, and all in memory,
knows json and numpy (zstandard for compressed files), nothing of ckptd's code, and checks no digests."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

WIDTH = {"BOOL": 1, "U8": 1, "I8": 1, "BF16": 2, "F16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}


class Naive:
    """A checkpoint: `manifest`, the whole `files` in the order of its objects, and what lies in them."""

    def __init__(self, directory: Path) -> None:
        self.manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_bytes())
        self.files = []
        for name, nbytes, _, rank, *packed in self.manifest["objects"]:
            data = (directory / name).read_bytes()
            if packed:
                data = unpacked(data, (directory / f"{name}.frames").read_bytes())
            assert len(data) == nbytes
            if self.manifest["form"] != "files":
                head = struct.unpack_from("<8sIIIIQQQ", self._array(data, "__ckptd.variable", 1))
                assert head[:3] == (b"ckptdvar", 1, rank) and head[6] == self.manifest["step"]
            self.files.append(data)

    def _array(self, data: bytes, name: str, width: int) -> np.ndarray[Any, Any]:
        (length,) = struct.unpack_from("<Q", data)
        begin, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
        return np.frombuffer(data, f"<u{width}", (end - begin) // width, 8 + length + begin)

    def covers(self, name: str) -> dict[int, np.ndarray[Any, Any]]:
        """The bits of a tensor, once for each of its covers."""
        one = next(tensor for tensor in self.manifest["tensors"] if tensor["name"] == name)
        shape, width, kind = one["shape"], WIDTH[one["dtype"]], self.manifest["classes"][one["tiles"]]
        place, array, start, cover = (column(kind[key]) for key in ("place", "array", "start", "cover"))
        offsets, sizes, strides = ([column(c) for c in kind[key]] for key in ("offsets", "sizes", "strides"))
        found = {number: np.zeros(shape, f"<u{width}") for number in range(max(kind["covers"], 1))}
        times = {number: np.zeros(shape, int) for number in found}
        for i in range(kind["boxes"]):
            at, box, spelled = np.array(start[i]), (), kind["arrays"][array[i]]
            for offset, size, stride in zip(offsets, sizes, strides, strict=True):
                at = at[..., None] + np.arange(size[i]) * stride[i]
                box += (slice(offset[i], offset[i] + size[i]),)  # type: ignore[assignment]
            own = name + spelled[1:] if spelled[0] == "*" else spelled[1:]
            found[cover[i]][box] = self._array(self.files[place[i]], own, width)[at]
            times[cover[i]][box] += 1
        assert all((count == 1).all() for count in times.values())
        return found

    def objects(self, index: int) -> Any:
        variable = self._array(self.files[index], "__ckptd.variable", 1).tobytes()
        (length,) = struct.unpack_from("<Q", variable, 40)
        return untagged(json.loads(variable[256 : 256 + length])["tree"])


def unpacked(data: bytes, table: bytes) -> bytes:
    """The bytes of a compressed file."""
    whole = b""
    for nbytes, width in struct.iter_unpack("<IB3x", table[32:]):
        group, data = data[:nbytes], data[nbytes:]
        if width:
            planes = zstandard.decompress(group)
            items = np.frombuffer(planes, "u1", len(planes) // width * width)
            group = items.reshape(width, -1).T.tobytes() + planes[len(items) :]
        whole += group
    return whole


def column(items: list[Any]) -> list[int]:
    """The numbers of a packed column."""
    found = []
    for base, *loops in (item if isinstance(item, list) else [item] for item in items):
        numbers = [base]
        for n, step in zip(loops[::2], loops[1::2], strict=True):
            numbers = [number + i * step for i in range(n) for number in numbers]
        found += numbers
    return found


def untagged(value: Any) -> Any:
    """A value without its tags: tuples and sets as lists, dicts as dicts, arrays as numpy's."""
    if not isinstance(value, dict):
        return [untagged(item) for item in value] if isinstance(value, list) else value
    if "$" not in value:
        return {key: untagged(item) for key, item in value.items()}
    if value["$"] in ("array", "scalar"):
        return np.frombuffer(base64.b64decode(value["v"]), value["d"]).reshape(value.get("s", []))
    if value["$"] in ("dict", "OrderedDict", "Counter", "defaultdict"):
        return {untagged(k): untagged(v) for k, v in value["v"]}
    return untagged(value["v"])
