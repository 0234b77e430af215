"""The table of digests that lies beside each stored file, `NAME.digests`.

    0   8  magic "ckptdtab"
    8   4  version, 1                  (all numbers little-endian)
    12  4  bytes of a block, 65536
    16  8  bytes of the file
    24  8  number of blocks, n
    32     n x 16: the blocks' xxh3_128 in canonical form; the last one as if zeros filled it up

The digests are those of the cells of an image (`ckptd.image.digest`), so that a seal record's are
written as they are.  The *root* of a file is the xxh3_128 of its digests; length and root are in the
manifest, so that every byte of the table is checked.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ckptd.errors import CorruptCheckpoint
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES, cells_of, digest_of_digests

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES: Final = CELL_BYTES
TABLE_SUFFIX: Final = ".digests"
HEAD_BYTES: Final = 32
_MAGIC: Final = b"ckptdtab"
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sIIQQ")


def table_bytes(file_bytes: int) -> int:
    """Returns the length of the table of a file of so many bytes."""
    return HEAD_BYTES + cells_of(file_bytes) * DIGEST_BYTES


def write_table(file_bytes: int, digests: bytes) -> bytes:
    """Returns the table of a file.

    Args:
        digests: 16 bytes per block of the file.

    Raises:
        ValueError: their number is not that of the blocks.
    """
    count = cells_of(file_bytes)
    if len(digests) != count * DIGEST_BYTES:
        raise ValueError(f"{file_bytes} bytes have {count} blocks, found {len(digests)} bytes of digests")
    return _HEAD.pack(_MAGIC, _VERSION, BLOCK_BYTES, file_bytes, count) + digests


def read_table(name: str, table: Buffer, file_bytes: int, root: bytes) -> bytes:
    """Returns the digests of a file, 16 bytes per block, after checking them against its root.

    Args:
        name: the file's, for the message.
        file_bytes, root: what the manifest says of the file.

    Raises:
        CorruptCheckpoint: this is not that file's table.
    """
    view = memoryview(table).cast("B")
    expected = table_bytes(file_bytes)
    if len(view) != expected:
        raise _corrupt(name, f"it has {len(view)} bytes, {file_bytes} bytes of file need {expected}")
    head, digests = bytes(view[:HEAD_BYTES]), bytes(view[HEAD_BYTES:])
    if head[:8] != _MAGIC:
        raise _corrupt(name, f"it begins with {head[:8]!r}, expected {_MAGIC!r}")
    if head != _HEAD.pack(_MAGIC, _VERSION, BLOCK_BYTES, file_bytes, len(digests) // DIGEST_BYTES):
        _, version, block, length, count = _HEAD.unpack(head)
        raise _corrupt(
            name,
            f"it is of version {version}, {count} blocks of {block} bytes, for a file of {length}; expected "
            f"version {_VERSION}, {len(digests) // DIGEST_BYTES} blocks of {BLOCK_BYTES}, {file_bytes}",
        )
    found = digest_of_digests(digests)
    if found != root:
        raise _corrupt(name, f"its root is {found.hex()}, the manifest says {root.hex()}")
    return digests


def as_rows(digests: bytes) -> NDArray[np.uint8]:
    """Returns digests as an array [blocks, 16], without a copy."""
    return np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)


def _corrupt(name: str, why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"the digests of {name} cannot be used", why, "use another checkpoint, or repair this one"
    )
