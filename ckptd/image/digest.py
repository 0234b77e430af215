"""Digests of cells: what says that bytes are the bytes they were.

An image is cut into cells of 64 KiB, counted from its first byte.  A cell's
digest is the xxh3_128 of its content in xxhash's canonical (big-endian) form; the
last cell is hashed as if zeros filled it up, so that its digest is also that of
the padded chunk which the erasure code works on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xxhash import xxh3_128_digest

from ckptd.erasure.stripe import CELL_BYTES as CELL_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

DIGEST_BYTES = 16


def cells_of(nbytes: int) -> int:
    """Returns how many cells `nbytes` bytes take; the last one may be partly filled.

    Raises:
        ValueError: `nbytes` is negative.
    """
    if nbytes < 0:
        raise ValueError(f"a length cannot be negative, found {nbytes}")
    return -(-nbytes // CELL_BYTES)


def cell_digests(buffer: Buffer) -> bytes:
    """Returns the digests of all cells of `buffer`, 16 bytes each, one after another.

    Reads in place; nothing but a partly filled last cell is copied.  xxhash keeps the
    GIL for inputs as short as a cell (it lets go from about 100 KB on): other threads
    run at the interpreter's switch interval only, so whoever digests beside an event
    loop shortens it (`sys.setswitchinterval`), or digests in slices.

    Args:
        buffer: any C-contiguous buffer; its bytes count, not its items.

    Raises:
        ValueError: the buffer is not contiguous.
    """
    view = _bytes_of(buffer)
    whole = len(view) - len(view) % CELL_BYTES
    digest, cell = xxh3_128_digest, CELL_BYTES
    digests = [digest(view[start : start + cell]) for start in range(0, whole, cell)]
    if whole < len(view):
        digests.append(digest(bytes(view[whole:]).ljust(cell, b"\0")))
    return b"".join(digests)


def digest_of_digests(digests: bytes) -> bytes:
    """Returns the 16 bytes that stand for a whole image: the xxh3_128 of its cells' digests."""
    return bytes(xxh3_128_digest(digests))


def mismatches(buffer: Buffer, digests: Buffer) -> list[int]:
    """Returns the ascending indices of the cells of `buffer` that differ from `digests`.

    Args:
        buffer: as in `cell_digests`.
        digests: 16 bytes per cell of `buffer`.

    Raises:
        ValueError: the number of digests is not the number of cells.
    """
    view, expected = _bytes_of(buffer), bytes(_bytes_of(digests))
    count = cells_of(len(view))
    if len(expected) != count * DIGEST_BYTES:
        raise ValueError(
            f"{len(view)} bytes have {count} cells, which take {count * DIGEST_BYTES} bytes of digests; "
            f"found {len(expected)}"
        )
    found = cell_digests(view)
    if found == expected:
        return []
    spans = [slice(i, i + DIGEST_BYTES) for i in range(0, len(found), DIGEST_BYTES)]
    return [index for index, span in enumerate(spans) if found[span] != expected[span]]


def _bytes_of(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ValueError("digests need a contiguous buffer")
    # A view with an empty dimension cannot be cast, and has no bytes to look at.
    return view.cast("B") if view.nbytes else memoryview(b"")
