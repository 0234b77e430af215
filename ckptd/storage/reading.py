"""Reading a checkpoint: its manifest at once, everything else when it is asked for.

    with open_checkpoint(url) as checkpoint:
        rows = checkpoint["model.layers.0.weight"][0:10]     # reads the blocks that hold them, and no others

Arrays are numpy's; a dtype that numpy lacks (BF16, F8) comes as unsigned integers of its width, unless
`wrap` makes something else of it (`ckptd.open` returns torch's tensors).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ckptd.errors import CorruptCheckpoint, CorruptImage, InvalidRequest, NotFound
from ckptd.image import ImagePlan, Variable, decode, header
from ckptd.image.digest_table import BLOCK_BYTES, TABLE_SUFFIX, read_table, table_bytes
from ckptd.image.manifest import MANIFEST_NAME, Manifest, StoredObject, StoredTensor
from ckptd.image.plan import DTYPE_BITS
from ckptd.image.variable import read_tail
from ckptd.layout import boxes
from ckptd.layout.tiles import Tiles
from ckptd.storage import catalog, compression, place, transfer
from ckptd.storage.cache import BlockCache
from ckptd.storage.fetch import read_verified
from ckptd.storage.manifests import read_manifest
from ckptd.storage.salvage import Salvage
from ckptd.storage.store import Reader, Store, open_store

Array = NDArray[np.generic]
Wrap = Callable[[Array, str], Any]  # (values, safetensors dtype code) -> what the caller gets

_NUMPY: Final[Mapping[str, str]] = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "i2", "U16": "u2", "F16": "f2", "I32": "i4", "U32": "u4",
    "F32": "f4", "I64": "i8", "U64": "u8", "F64": "f8", "C64": "c8",
}  # fmt: skip


def numpy_dtype(code: str) -> np.dtype[Any]:
    """Returns numpy's dtype of a safetensors code, or unsigned integers of its width."""
    return np.dtype(_NUMPY.get(code) or f"u{DTYPE_BITS[code] // 8}")


def item_bytes(code: str) -> int:
    """Returns the bytes of one element."""
    return DTYPE_BITS[code] // 8


def open_checkpoint(url: str, *, wrap: Wrap | None = None) -> Checkpoint:
    """Returns the checkpoint at `url` (see `ckptd.storage.place`).

    Raises:
        NotFound: nothing with a manifest is there.
        CorruptCheckpoint: the manifest cannot be used.
        InvalidRequest: the URL names no checkpoint, or a store that does not exist.
    """
    wanted = place.parse(url)
    store = open_store(wanted) if isinstance(wanted, str) else catalog.find(wanted)
    try:
        manifest = read_manifest(store)
    except NotFound as error:
        raise NotFound(
            f"there is no checkpoint at {url}",
            f"{store.url} has no {MANIFEST_NAME}",
            "ckptd ls shows what there is",
        ) from error
    return Checkpoint(store, manifest, wrap)


@dataclass(frozen=True)
class OpenObject:
    """What is known of a file once its table and its header are verified."""

    stored: StoredObject
    plan: ImagePlan
    digests: bytes


class Checkpoint(Mapping[str, "StoredTensorView"]):
    """A stored checkpoint; files are opened when something of them is needed, and verified block by block."""

    def __init__(self, store: Store, manifest: Manifest, wrap: Wrap | None = None) -> None:
        self.store = store
        self.manifest = manifest
        self.cache = BlockCache()
        self._wrap = wrap or (lambda array, _: array)
        self._objects: dict[int, OpenObject] = {}
        self._frames_of: dict[int, compression.Frames] = {}
        self._lock = threading.Lock()
        self._by_layout: Mapping[str, Tiles] | None = None

    def __getitem__(self, name: str) -> StoredTensorView:
        return StoredTensorView(self, self.tensor(name), self._wrap)

    def __contains__(self, name: object) -> bool:
        return name in self.manifest.by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.by_name)

    def __len__(self) -> int:
        return len(self.manifest.by_name)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forgets what was read; files are open only while something is read of them."""
        self.cache.clear()
        self._objects.clear()
        self._frames_of.clear()

    @property
    def names(self) -> list[str]:
        return list(self.manifest.by_name)

    @property
    def layout(self) -> Any:
        """The layout's name, text and parameters (`StoredLayout`), or None where tiles are explicit."""
        return self.manifest.layout

    def tensor(self, name: str) -> StoredTensor:
        """Raises NotFound: no such tensor; the message names similar ones."""
        found = self.manifest.by_name.get(name)
        if found is None:
            import difflib

            near = difflib.get_close_matches(name, self.manifest.by_name, 3)
            raise NotFound(
                f"no tensor {name!a} in {self.store.url}",
                f"it has {len(self)} others",
                f"did you mean {', '.join(near)}?" if near else "names lists them",
            )
        return found

    def tiles(self, name: str) -> Tiles:
        """Returns where a tensor lies; places are indices of `manifest.objects`.

        Raises:
            CorruptCheckpoint: the layout does not describe it.
        """
        tiles = self.manifest.tiles(self.tensor(name).name)
        if tiles is not None:
            return tiles
        if self._by_layout is None:
            from ckptd.storage.by_layout import stored_tiles

            self._by_layout = stored_tiles(self.manifest)
        return self._by_layout[name]

    def objects(self, rank: int = 0) -> object:
        """Returns what a rank kept beside its tensors, as `ckptd.image.decode` gives it.

        Raises:
            NotFound: no such rank.
            CorruptCheckpoint: it cannot be read.
        """
        index = next((i for i, o in enumerate(self.manifest.objects) if o.rank == rank), None)
        if index is None:
            raise NotFound(
                f"rank {rank} has no file in {self.store.url}",
                f"it has {len(self.manifest.objects)}",
                "choose another rank",
            )
        variable = self.variable(index)
        try:
            return decode(variable.objects) if variable.objects else None
        except CorruptImage as error:
            raise _of_object(self.manifest.objects[index].name, error) from error

    def variable(self, index: int) -> Variable:
        """Returns the head of an object, after checking that it belongs to this checkpoint."""
        found = self.opened(index)
        stored, plan = found.stored, found.plan
        begin = plan.variable_offset
        first = begin // BLOCK_BYTES * BLOCK_BYTES
        with self.open(index) as reader:
            tail = bytearray(stored.nbytes - first)
            read_verified(reader, first, memoryview(tail), found.digests, stored.name)
        try:
            variable = read_tail(plan, memoryview(tail)[begin - first :])
        except CorruptImage as error:
            raise _of_object(stored.name, error) from error
        m = self.manifest
        if (variable.job, variable.step, variable.rank) != (m.job, m.step, stored.rank):
            raise CorruptCheckpoint(
                f"{stored.name} belongs to another checkpoint",
                f"it is of job {variable.job}, step {variable.step}, rank {variable.rank}; expected "
                f"{m.job}, {m.step}, {stored.rank}",
                "use another checkpoint",
            )
        return variable

    def open(self, index: int) -> Reader:
        """Opens an object and checks its length.

        Raises:
            CorruptCheckpoint: it is gone, or has another length.
        """
        stored = self.manifest.objects[index]
        try:
            reader = self.store.open(stored.name)
        except NotFound as error:
            raise CorruptCheckpoint(
                f"{self.store.url} is not complete", f"{stored.name} is gone", "use another checkpoint"
            ) from error
        if reader.size != stored.file_bytes:
            reader.close()
            what = "truncated" if reader.size < stored.file_bytes else "too long"
            raise CorruptCheckpoint(
                f"{stored.name} in {self.store.url} is {what}",
                f"it has {reader.size} bytes, the manifest says {stored.file_bytes}",
                "use another checkpoint",
            )
        if stored.packed is None:
            return reader
        try:
            return compression.UnpackingReader(reader, self._frames(index), stored.nbytes, stored.name)
        except BaseException:
            reader.close()
            raise

    def opened(self, index: int) -> OpenObject:
        """Returns the verified table and header of an object; read once.

        Raises:
            CorruptCheckpoint: one of them cannot be used.
        """
        with self._lock:
            if index not in self._objects:
                self._objects[index] = self._open_object(index)
            return self._objects[index]

    def digests(self, index: int) -> bytes:
        """Returns the digests of an object, checked against its root.

        Raises:
            CorruptCheckpoint: they cannot be used.
        """
        stored = self.manifest.objects[index]
        name = stored.name + TABLE_SUFFIX
        try:
            table = self.store.read(name, table_bytes(stored.nbytes))
        except NotFound as error:
            raise CorruptCheckpoint(
                f"{self.store.url} is not complete", f"{name} is gone", "use another checkpoint"
            ) from error
        return read_table(stored.name, table, stored.nbytes, stored.root)

    def _frames(self, index: int) -> compression.Frames:
        """The frames of a compressed object, read once."""
        found = self._frames_of.get(index)
        if found is None:
            stored = self.manifest.objects[index]
            assert stored.packed is not None
            found = compression.load_frames(self.store, stored.name, stored.nbytes, stored.packed)
            self._frames_of[index] = found
        return found

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[transfer.Damage]:
        """Reads and checks everything; returns what is damaged, [] if nothing is.

        Args:
            progress: called with (bytes done, bytes in all), from one thread.
        """
        return transfer.verify(self, progress)

    def salvage(self) -> Salvage:
        """Returns what yields (name, values) of every tensor that verifies, and knows the others afterwards.

        kept = checkpoint.salvage()
        state = dict(kept)                  # kept.lost: {name: why}
        """
        return Salvage(self, self._wrap)

    def _open_object(self, index: int) -> OpenObject:
        stored = self.manifest.objects[index]
        if self.manifest.form == "files":
            raise InvalidRequest(
                f"{self.store.url} holds another tool's files",
                "its manifest describes no tensors",
                "read it with the tool that wrote it (torch.distributed.checkpoint)",
            )
        digests = self.digests(index)
        try:
            with self.open(index) as reader:
                first = _head(reader, min(BLOCK_BYTES, stored.nbytes), digests, stored.name)
                total = header.reserved_bytes(memoryview(first), stored.nbytes)
                if total > len(first):
                    whole = min(stored.nbytes, -(-total // BLOCK_BYTES) * BLOCK_BYTES)
                    first = _head(reader, whole, digests, stored.name)
            plan = ImagePlan.parse(memoryview(first)[:total], stored.nbytes)
        except CorruptImage as error:
            raise _of_object(stored.name, error) from error
        return OpenObject(stored, plan, digests)


class StoredTensorView:
    """One logical tensor of a checkpoint; `view[slices]` reads."""

    def __init__(self, checkpoint: Checkpoint, tensor: StoredTensor, wrap: Wrap) -> None:
        self._checkpoint = checkpoint
        self._wrap = wrap
        self.name = tensor.name
        self.dtype = tensor.dtype  # safetensors' code
        self.shape = tensor.shape
        self.differs = tensor.differs  # ranks kept different values; the first one's are read

    def __getitem__(self, key: object) -> Any:
        """Returns the elements that a basic index selects (ints, slices with positive steps, an Ellipsis).

        Raises:
            IndexError, TypeError: as numpy does.
            CorruptCheckpoint: a block that holds some of them is damaged.
        """
        return self.read(key)

    def read(self, key: object, rank: int = 0) -> Any:
        """Returns what `self[key]` does, of a tensor that differs between ranks as `rank` kept it."""
        box, rest = _box(key, self.shape)
        dtype = numpy_dtype(self.dtype)
        sizes = tuple(stop - start for start, stop in box)
        values: Array = np.empty(sizes, dtype)
        if values.size:
            tiles = _one_box(self.shape, [start for start, _ in box], sizes, self.name, rank)
            job = transfer.Job(self._checkpoint)
            job.want(self.name, tiles, {self.name: values.reshape(-1)})
            job.run()
        return self._wrap(values[rest], self.dtype)

    def __repr__(self) -> str:
        return f"StoredTensorView({self.name!r}, {self.dtype}, {list(self.shape)})"


def _box(key: object, shape: tuple[int, ...]) -> tuple[list[tuple[int, int]], tuple[Any, ...]]:
    """The range of each dim that an index needs, and the index that remains to be applied to it."""
    keys: Sequence[Any] = key if isinstance(key, tuple) else (key,)
    if any(k is not Ellipsis and not isinstance(k, (slice, int, np.integer)) for k in keys):
        raise TypeError(f"only ints, slices and one Ellipsis can be read, found {key!r}")
    given = sum(k is not Ellipsis for k in keys)
    if given > len(shape) or len(keys) - given > 1:
        raise IndexError(f"{key!r} has too many items for the shape {list(shape)}")
    fill = [slice(None)] * (len(shape) - given)
    at = next((i for i, k in enumerate(keys) if k is Ellipsis), len(keys))
    full = [*keys[:at], *fill, *keys[at + 1 :]]
    box: list[tuple[int, int]] = []
    rest: list[Any] = []
    for k, size in zip(full, shape, strict=True):
        if isinstance(k, slice):
            start, stop, step = k.indices(size)
            if step < 0:
                raise IndexError("a slice with a negative step cannot be read")
            box.append((start, max(start, stop)))
            rest.append(slice(None, None, step))
        else:
            index = int(k) + size if k < 0 else int(k)
            if not 0 <= index < size:
                raise IndexError(f"index {k} is out of range for a dim of {size}")
            box.append((index, index + 1))
            rest.append(0)
    return box, tuple(rest)


def _one_box(
    shape: tuple[int, ...], offset: Sequence[int], sizes: tuple[int, ...], array: str, place: int
) -> Tiles:
    def row(values: Sequence[int]) -> NDArray[np.int64]:
        return np.array([list(values)], np.int64).reshape(1, len(shape))

    zero = np.zeros(1, np.int64)
    assert math.prod(sizes)
    return Tiles(
        shape,
        row(offset),
        row(sizes),
        np.full(1, place, np.int64),
        zero,
        zero,
        row(boxes.row_major(sizes)),
        zero,
        (array,),
    )


def _head(reader: Reader, nbytes: int, digests: bytes, name: str) -> bytearray:
    found = bytearray(nbytes)
    read_verified(reader, 0, memoryview(found), digests, name)
    return found


def _of_object(name: str, error: CorruptImage) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{name} cannot be read", error.why or error.what, "use another checkpoint")
