"""Seekable compression of a stored file: groups of 1 MiB, each a zstd frame of its byte planes.

A file may lie compressed under its own name, encoding `zstd-planes/1`: it is cut into groups of 1 MiB, and
the frames of the groups lie one after another.  `NAME.frames` says how long each is:

    0   8  magic "ckptdfrm"
    8   4  version, 1                  (all numbers little-endian)
    12  4  bytes of a group, 1048576
    16  8  bytes of the file, uncompressed
    24  8  number of groups, n
    32     n x 8: bytes of the group's frame (4), width (1), zeros (3)

Width 0: the group's bytes as they are.  Width 1, 2, 4 or 8: one zstd frame that declares its size; byte i of
the group is byte i // width of plane i % width, the planes lie one after another, and what is left behind the
last whole item follows them.  In floats the exponents' bytes are alike; beside each other they shrink.

Digests are those of the uncompressed bytes, so that nothing else changes: a range is read by decompressing
the groups that it touches, and verified as ever.  The manifest holds the length of all frames and the
xxh3_128 of this table.  No frame is decompressed before its declared size is known to be its group's, which
bounds the memory that hostile ones can take.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import numpy as np
import zstandard
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from ckptd.errors import CorruptCheckpoint, NotFound
from ckptd.image.manifest import Packed
from ckptd.image.plan import DTYPE_BITS, ImagePlan
from ckptd.storage.store import Reader, Store

if TYPE_CHECKING:
    from typing_extensions import Buffer

GROUP_BYTES: Final = 1 << 20
FRAMES_SUFFIX: Final = ".frames"
LEVEL: Final = 1
_WIDTHS: Final = (0, 1, 2, 4, 8)
_MAGIC: Final = b"ckptdfrm"
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sIIQQ")
_FRAME: Final = np.dtype([("nbytes", "<u4"), ("width", "u1"), ("zeros", "u1", 3)])
_KEPT_GROUPS: Final = 8  # decompressed ones that an open file keeps, since ranges begin within groups

Frames = NDArray[np.void]
_local = threading.local()  # zstd's contexts are one thread's


# --- frames -------------------------------------------------------------------------------------------------


def pack_group(group: Buffer, width: int) -> tuple[bytes, int]:
    """Returns the frame of a group and its width: 0 where compression does not shorten it.

    Args:
        group: 1 to 1 MiB bytes.
        width: of the elements that most of it holds: 1, 2, 4 or 8 bytes.
    """
    flat: NDArray[np.uint8] = np.frombuffer(memoryview(group), np.uint8)
    whole = len(flat) - len(flat) % width
    planes = np.concatenate([flat[:whole].reshape(-1, width).T.reshape(-1), flat[whole:]]).tobytes()
    compressor = getattr(_local, "compressor", None)
    if compressor is None:
        compressor = _local.compressor = zstandard.ZstdCompressor(level=LEVEL)
    frame: bytes = compressor.compress(planes)
    return (frame, width) if len(frame) < len(flat) else (flat.tobytes(), 0)


def unpack_group(frame: Buffer, width: int, into: memoryview, name: str) -> None:
    """Fills `into` with the bytes of a group.

    Raises:
        CorruptCheckpoint: the frame is not one of as many bytes; nothing beyond `len(into)` was allocated.
    """
    frame = memoryview(frame)
    if width == 0:
        if len(frame) != len(into):
            raise _corrupt(name, f"a group has {len(frame)} bytes, expected {len(into)}")
        into[:] = frame
        return
    decompressor = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor(max_window_size=GROUP_BYTES)
    try:
        # zstandard allocates what a frame declares, whatever max_output_size says.
        declared = zstandard.frame_content_size(frame)
        if declared != len(into):
            raise _corrupt(name, f"a frame declares {declared} bytes, its group has {len(into)}")
        data = decompressor.decompress(frame, max_output_size=len(into), allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _corrupt(name, f"a frame cannot be decompressed: {error}") from error
    if len(data) != len(into):
        raise _corrupt(name, f"a frame holds {len(data)} bytes, its group has {len(into)}")
    planes, target = np.frombuffer(data, np.uint8), np.frombuffer(into, np.uint8)
    whole = len(planes) - len(planes) % width
    target[:whole].reshape(-1, width)[...] = planes[:whole].reshape(width, -1).T
    target[whole:] = planes[whole:]


# --- writing ------------------------------------------------------------------------------------------------


class Packing:
    """Passes a file on compressed, group by group, in as many threads as there are processors (at most 4)."""

    def __init__(self, pieces: Iterable[Buffer], widths: Sequence[int]) -> None:
        """`widths`: of each group, as `widths_of` gives them."""
        self._pieces = pieces
        self._widths = widths
        self._frames: list[tuple[int, int]] = []
        self._file_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        threads = min(4, len(os.sched_getaffinity(0)))
        waiting: deque[Future[tuple[bytes, int]]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="ckptd-pack") as pool:
            for number, group in enumerate(_groups(self._pieces)):
                self._file_bytes += len(group)
                waiting.append(pool.submit(pack_group, group, self._widths[number]))
                if len(waiting) > 2 * threads:
                    yield self._taken(waiting)
            while waiting:
                yield self._taken(waiting)

    @property
    def nbytes(self) -> int:
        """Bytes of all frames that were passed on."""
        return sum(nbytes for nbytes, _ in self._frames)

    def table(self) -> bytes:
        """Returns the table of frames of all that was passed on."""
        head = _HEAD.pack(_MAGIC, _VERSION, GROUP_BYTES, self._file_bytes, len(self._frames))
        rows = np.zeros(len(self._frames), _FRAME)
        rows["nbytes"], rows["width"] = np.array(self._frames, np.int64).reshape(-1, 2).T
        return head + rows.tobytes()

    def _taken(self, waiting: deque[Future[tuple[bytes, int]]]) -> bytes:
        frame, width = waiting.popleft().result()
        self._frames.append((len(frame), width))
        return frame


def widths_of(plan: ImagePlan) -> list[int]:
    """Returns for each group of an image the width of the elements that most of it holds."""
    count = -(-plan.image_bytes // GROUP_BYTES)
    held = np.zeros((count, 9), np.int64)  # bytes by width
    for spec in plan.tensors:
        begin = plan.offset_of[spec.name]
        end, width = begin + spec.nbytes, max(DTYPE_BITS[spec.dtype] // 8, 1)
        first, last = begin // GROUP_BYTES, max(begin, end - 1) // GROUP_BYTES
        held[first : last + 1, width] += GROUP_BYTES
        held[first, width] -= begin - first * GROUP_BYTES
        held[last, width] -= (last + 1) * GROUP_BYTES - end
    held[:, 1] += 1  # where nothing lies
    return [int(width) for width in held.argmax(axis=1)]


def frames_root(table: bytes) -> bytes:
    """Returns what the manifest holds of a table of frames: its xxh3_128, 16 bytes."""
    return bytes(xxh3_128_digest(table))


# --- reading ------------------------------------------------------------------------------------------------


def frames_bytes(file_bytes: int) -> int:
    """Returns the length of the table of frames of a file of so many uncompressed bytes."""
    return _HEAD.size + -(-file_bytes // GROUP_BYTES) * _FRAME.itemsize


def load_frames(store: Store, name: str, file_bytes: int, packed: Packed) -> Frames:
    """Returns the frames of a stored file, as `read_frames`.

    Raises:
        CorruptCheckpoint: their table is gone, or not that file's.
    """
    try:
        table = store.read(name + FRAMES_SUFFIX, frames_bytes(file_bytes))
    except NotFound as error:
        raise CorruptCheckpoint(
            f"{store.url} is not complete", f"{name}{FRAMES_SUFFIX} is gone", "use another checkpoint"
        ) from error
    return read_frames(name, table, file_bytes, packed)


def read_frames(name: str, table: bytes, file_bytes: int, packed: Packed) -> Frames:
    """Returns the frames of a file, after checking all of the table.

    Args:
        name: the file's, for the message.
        file_bytes, packed: what the manifest says of the file.

    Raises:
        CorruptCheckpoint: this is not that file's table.
    """
    if len(table) != frames_bytes(file_bytes) or xxh3_128_digest(table) != packed.root:
        raise _corrupt(name, "its table of frames does not match the manifest")
    frames: Frames = np.frombuffer(table, _FRAME, offset=_HEAD.size)
    if table[: _HEAD.size] != _HEAD.pack(_MAGIC, _VERSION, GROUP_BYTES, file_bytes, len(frames)):
        raise _corrupt(name, f"its table of frames begins with {table[: _HEAD.size].hex()}")
    if not np.isin(frames["width"], _WIDTHS).all() or frames["zeros"].any():
        raise _corrupt(name, "its table of frames names a width that is unknown")
    lengths = frames["nbytes"].astype(np.int64)
    if (lengths < 1).any() or (lengths > GROUP_BYTES).any() or int(lengths.sum()) != packed.nbytes:
        raise _corrupt(name, f"its frames make {int(lengths.sum())} bytes, expected {packed.nbytes}")
    return frames


class UnpackingReader(Reader):
    """An open compressed file that reads like the uncompressed one; usable from several threads."""

    def __init__(self, packed: Reader, frames: Frames, file_bytes: int, name: str) -> None:
        self._packed = packed
        self._name = name
        self._ends = np.cumsum(frames["nbytes"].astype(np.int64))
        self._frames = frames
        self._kept: OrderedDict[int, bytearray] = OrderedDict()
        self._lock = threading.Lock()
        self.size = file_bytes

    def read_into(self, start: int, into: memoryview) -> None:
        at, end = start, start + len(into)
        if end > self.size:
            raise _corrupt(self._name, f"it ends at byte {self.size}, {end} were expected")
        while at < end:
            number = at // GROUP_BYTES
            first = number * GROUP_BYTES
            stop = min(first + GROUP_BYTES, self.size)
            part = into[at - start : min(end, stop) - start]
            if len(part) == stop - first:
                self._unpack(number, part)
            else:
                part[:] = memoryview(self._group(number, stop - first))[at - first : at - first + len(part)]
            at += len(part)

    def close(self) -> None:
        self._packed.close()
        self._kept.clear()

    def _group(self, number: int, nbytes: int) -> bytearray:
        """A whole group; the newest few are kept."""
        with self._lock:
            found = self._kept.get(number)
        if found is None:
            found = bytearray(nbytes)
            self._unpack(number, memoryview(found))
            with self._lock:
                self._kept[number] = found
                while len(self._kept) > _KEPT_GROUPS:
                    self._kept.popitem(last=False)
        return found

    def _unpack(self, number: int, into: memoryview) -> None:
        nbytes, width = int(self._frames["nbytes"][number]), int(self._frames["width"][number])
        frame = bytearray(nbytes)
        self._packed.read_into(int(self._ends[number]) - nbytes, memoryview(frame))
        unpack_group(frame, width, into, self._name)


def _groups(pieces: Iterable[Buffer]) -> Iterator[bytes]:
    """The same bytes in groups; each is a copy, since a group waits for its thread."""
    rest = bytearray()
    for piece in pieces:
        view = memoryview(piece).cast("B")
        at = 0
        while at < len(view):
            taken = view[at : at + GROUP_BYTES - len(rest)]
            rest += taken
            at += len(taken)
            if len(rest) == GROUP_BYTES:
                yield bytes(rest)
                rest.clear()
    if rest:
        yield bytes(rest)


def _corrupt(name: str, why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{name} cannot be decompressed", why, "use another checkpoint")
