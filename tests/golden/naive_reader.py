"""A second reader of checkpoints, written from docs/format.md alone: slow, obvious, all in memory.

It knows json, numpy and xxhash, and nothing of ckptd's code.  It trusts what it reads as far as digests go.
"""

from __future__ import annotations

import base64
import itertools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128_digest, xxh3_128_hexdigest

WIDTH = {"BOOL": 1, "U8": 1, "I8": 1, "BF16": 2, "F16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}


class Naive:
    """A checkpoint: `manifest`, the whole `files`, and what lies in them."""

    def __init__(self, directory: Path) -> None:
        text = (directory / "manifest.json").read_bytes()
        self.manifest: dict[str, Any] = json.loads(text)
        assert self.manifest["ckptd.manifest"] == 1
        assert self.manifest["digest"] == xxh3_128_hexdigest(text[: text.rindex(b',"digest"')])
        self.files = [self._file(directory, *entry) for entry in self.manifest["objects"]]

    def _file(self, directory: Path, name: str, nbytes: int, root: str, rank: int) -> bytes:
        data, table = ((directory / file).read_bytes() for file in (name, f"{name}.digests"))
        blocks = [data[at : at + 65536].ljust(65536, b"\0") for at in range(0, len(data), 65536)]
        digests = b"".join(map(xxh3_128_digest, blocks))
        assert table == struct.pack("<8sIIQQ", b"ckptdtab", 1, 65536, nbytes, len(blocks)) + digests
        assert len(data) == nbytes and xxh3_128_hexdigest(digests) == root
        head = struct.unpack_from("<8sIIIIQQQ", self._array(data, "__ckptd.variable", 1))
        assert head[:3] == (b"ckptdvar", 1, rank) and head[6] == self.manifest["step"]
        return data

    def _array(self, data: bytes, name: str, width: int) -> np.ndarray[Any, Any]:
        """The elements of an array of a file, as unsigned integers of their width."""
        (length,) = struct.unpack_from("<Q", data)
        entry = json.loads(data[8 : 8 + length])[name]
        begin, end = entry["data_offsets"]
        return np.frombuffer(data, f"<u{width}", (end - begin) // width, 8 + length + begin)

    def covers(self, name: str) -> dict[int, np.ndarray[Any, Any]]:
        """The bits of a tensor, once for each of its covers."""
        tensor = next(t for t in self.manifest["tensors"] if t["name"] == name)
        shape, width = tensor["shape"], WIDTH[tensor["dtype"]]
        kind = self.manifest["classes"][tensor["tiles"]]
        place, array, start, cover = (column(kind[key]) for key in ("place", "array", "start", "cover"))
        offsets, sizes, strides = (
            list(zip(*map(column, kind[key]), strict=True)) if shape else [()] * len(place)
            for key in ("offsets", "sizes", "strides")
        )
        found = {number: np.zeros(shape, f"<u{width}") for number in range(max(kind["covers"], 1))}
        filled = dict.fromkeys(found, 0)
        for i in range(kind["boxes"]):
            spelled = kind["arrays"][array[i]]
            own = name + spelled[1:] if spelled[0] == "*" else spelled[1:]
            values = self._array(self.files[place[i]], own, width)
            for x in itertools.product(*map(range, sizes[i])):
                at = start[i] + sum(a * b for a, b in zip(x, strides[i], strict=True))
                found[cover[i]][tuple(a + b for a, b in zip(x, offsets[i], strict=True))] = values[at]
                filled[cover[i]] += 1
        assert all(count == found[0].size for count in filled.values())
        return found

    def objects(self, index: int) -> Any:
        """The tree of objects in a file, without its tags but for arrays."""
        variable = self._array(self.files[index], "__ckptd.variable", 1).tobytes()
        (length,) = struct.unpack_from("<Q", variable, 40)
        return untagged(json.loads(variable[256 : 256 + length])["tree"])


def column(items: list[Any]) -> list[int]:
    """The numbers of a packed column."""
    found = []
    for item in items:
        base, *loops = item if isinstance(item, list) else [item]
        pairs = list(zip(loops[::2], loops[1::2], strict=True))[::-1]  # the slowest first, as product counts
        for index in itertools.product(*(range(n) for n, _ in pairs)):
            found.append(base + sum(i * step for i, (_, step) in zip(index, pairs, strict=True)))
    return found


def untagged(value: Any) -> Any:
    """A value without its tags: tuples and sets as lists, dicts as dicts, arrays as numpy's."""
    if isinstance(value, list):
        return [untagged(item) for item in value]
    if not isinstance(value, dict) or "$" not in value:
        return {k: untagged(v) for k, v in value.items()} if isinstance(value, dict) else value
    if value["$"] in ("array", "scalar"):
        return np.frombuffer(base64.b64decode(value["v"]), value["d"]).reshape(value.get("s", []))
    if value["$"] in ("dict", "OrderedDict", "Counter", "defaultdict"):
        return {untagged(k): untagged(v) for k, v in value["v"]}
    return untagged(value["v"])
