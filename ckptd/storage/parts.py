"""What one process contributes to a checkpoint: a file, and which boxes of which tensors lie in it.

A part travels to the process that publishes as JSON (`Part.write`, `Part.read`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ckptd.errors import CorruptCheckpoint
from ckptd.image import columns
from ckptd.image.fields import Fields, MalformedField
from ckptd.image.manifest import Packed
from ckptd.image.names import check_name, check_tensor_name
from ckptd.image.plan import DTYPE_BITS, MAX_IMAGE_BYTES
from ckptd.layout.fingerprint import add, fingerprint
from ckptd.layout.tiles import Tiles

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MAX_BYTES: Final = 256 << 20
_MAX_BOXES: Final = 1 << 20
_NUMBER: Final = 1 << 52
_WORDS: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, eq=False)
class LocalTensor:
    """The boxes of a logical tensor that lie in one array of one file."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # logical
    array: str  # its name in the file
    offsets: NDArray[np.int64]  # [n, d]
    sizes: NDArray[np.int64]  # [n, d]
    start: NDArray[np.int64]  # [n], elements of the array
    strides: NDArray[np.int64]  # [n, d]
    digest: bytes  # xxh3_128 of the array's bytes: what says that replicas are equal
    fingerprint: int | None = None  # of these boxes (`ckptd.layout.fingerprint`); None: not computed

    @classmethod
    def of_tiles(cls, name: str, dtype: str, tiles: Tiles, array: str, digest: bytes) -> LocalTensor:
        """Returns the tensor whose boxes at one place, in one array, are `tiles`."""
        return cls(
            name, dtype, tiles.shape, array, tiles.offsets, tiles.sizes, tiles.start, tiles.strides, digest
        )

    @classmethod
    def whole(cls, name: str, dtype: str, shape: Sequence[int], array: str, digest: bytes) -> LocalTensor:
        """Returns a tensor that lies in one array as a whole, row-major."""
        d = len(shape)
        full = np.array([list(shape)], np.int64).reshape(1, d)
        n = int((full > 0).all())
        strides = np.ones((1, d), np.int64)
        for dim in reversed(range(d - 1)):
            strides[:, dim] = strides[:, dim + 1] * full[:, dim + 1]
        zero = np.zeros((1, d), np.int64)
        return cls(
            name, dtype, tuple(shape), array, zero[:n], full[:n], zero[:n, :0].sum(1), strides[:n], digest
        )

    def fingerprinted(self, data: Buffer) -> LocalTensor:
        """Returns this tensor with its fingerprint, given its array's bytes; as it is where it has none.

        Types of less than a byte have no fingerprint.
        """
        width = DTYPE_BITS[self.dtype] // 8
        if width not in _WORDS or DTYPE_BITS[self.dtype] % 8:
            return self
        boxes: list[int] = []
        word = np.dtype(_WORDS[width])
        flat: NDArray[Any] = np.frombuffer(memoryview(data), word) if len(self.start) else np.empty(0, word)
        for offset, sizes, start, strides in zip(
            self.offsets, self.sizes, self.start, self.strides, strict=True
        ):
            box = np.lib.stride_tricks.as_strided(
                flat[int(start) :], sizes.tolist(), (strides * width).tolist(), writeable=False
            )
            boxes.append(fingerprint(box, offset.tolist()))
        return replace(self, fingerprint=add(boxes))

    @property
    def nbytes(self) -> int:
        """Of its boxes."""
        return int(self.sizes.prod(axis=1).sum()) * DTYPE_BITS[self.dtype] // 8

    def key(self) -> bytes:
        """Equal for two tensors whose arrays hold the same boxes at the same places."""
        return b"|".join(v.tobytes() for v in (self.offsets, self.sizes, self.start, self.strides))


@dataclass(frozen=True)
class Part:
    """A file, and what lies in it."""

    rank: int
    object: str  # file name
    nbytes: int
    root: bytes
    tensors: tuple[LocalTensor, ...]
    packed: Packed | None = None  # how it lies there, where it is compressed

    def write(self) -> bytes:
        """Returns the part as JSON."""
        head: dict[str, Any] = {
            "rank": self.rank,
            "object": self.object,
            "bytes": self.nbytes,
            "root": self.root.hex(),
        }
        if self.packed is not None:
            head["packed"] = [self.packed.nbytes, self.packed.root.hex()]
        return json.dumps(
            {**head, "tensors": [_tensor_json(t) for t in self.tensors]}, separators=(",", ":")
        ).encode("ascii")

    @classmethod
    def read(cls, data: bytes) -> Part:
        """Returns the part that `write` wrote.

        Raises:
            CorruptCheckpoint: these are not such bytes.
        """
        if len(data) > _MAX_BYTES:
            raise CorruptCheckpoint("this part of a checkpoint cannot be read", f"it has {len(data)} bytes")
        try:
            given = Fields(json.loads(data), "a part")
            rank, name = given.number("rank", _NUMBER), given.name("object", check_name)
            nbytes, root = given.number("bytes", MAX_IMAGE_BYTES), given.hex_bytes("root", 16)
            tensors = tuple(_tensor(item) for item in given.items("tensors", _NUMBER))
            packed = _packed(given.take("packed")) if given.has("packed") else None
            given.done()
        except (MalformedField, ValueError, RecursionError) as error:
            raise CorruptCheckpoint("this part of a checkpoint cannot be read", str(error)) from error
        return cls(rank, name, nbytes, root, tensors, packed)


def _packed(item: object) -> Packed:
    one = Fields.of_list(item, "how a part is compressed", ("bytes", "root"))
    return Packed(one.number("bytes", MAX_IMAGE_BYTES), one.hex_bytes("root", 16))


def _tensor_json(tensor: LocalTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "array": tensor.array,
        "digest": tensor.digest.hex(),
        **({} if tensor.fingerprint is None else {"fingerprint": f"{tensor.fingerprint:016x}"}),
        "boxes": len(tensor.start),
        "offsets": [columns.pack(c) for c in tensor.offsets.T],
        "sizes": [columns.pack(c) for c in tensor.sizes.T],
        "strides": [columns.pack(c) for c in tensor.strides.T],
        "start": columns.pack(tensor.start),
    }


def _tensor(item: object) -> LocalTensor:
    one = Fields(item, "a tensor of a part")
    name = one.name("name", lambda _, text: check_tensor_name(text))
    dtype, shape = one.text("dtype", 16), one.shape("shape", 64, MAX_IMAGE_BYTES)
    array = one.name("array", lambda _, text: check_tensor_name(text))
    digest, n = one.hex_bytes("digest", 16), one.number("boxes", _MAX_BOXES)
    known = one.has("fingerprint")
    mark = int.from_bytes(one.hex_bytes("fingerprint", 8), "big") if known else None
    vectors = []
    for key in ("offsets", "sizes", "strides"):
        given = one.items(key, 64)
        if len(given) != len(shape):
            raise MalformedField(f"{one.what} has {len(given)} columns of {key}")
        matrix = np.empty((n, len(shape)), np.int64)
        for dim, column in enumerate(given):
            matrix[:, dim] = columns.unpack(column, n)
        vectors.append(matrix)
    start = columns.unpack(one.take("start"), n)
    one.done()
    return LocalTensor(name, dtype, shape, array, vectors[0], vectors[1], start, vectors[2], digest, mark)
