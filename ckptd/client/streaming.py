"""Copies bytes past the caches: nobody on this processor reads an image soon.

An ordinary store reads the line that it is about to overwrite, and pushes training's data out
of the caches.  Streaming stores do neither; glibc's memcpy uses them from about 20 MB on only,
torch never.  ISA-L's `gf_vect_mul` uses them at every length, and multiplying by 1 is copying:
0.6 to 0.8 of the CPU time of `memmove` for tensors of 1 to 4 MiB where this was measured.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
from collections.abc import Callable

import numpy as np

from ckptd.erasure.kernel import library_paths

log = logging.getLogger("ckptd")

# (target's address, source's address, bytes)
ByteCopy = Callable[[int, int, int], None]

_ALIGNED_BYTES = 64  # ISA-L wants 32; images and torch's tensors have 64
_MOST_BYTES = 1 << 30  # ISA-L takes a C int; memmove streams such lengths itself
_TABLE_BYTES = 64  # ISA-L wants 32
_TEST_LENGTHS = (64, 128, 192, 256, 448, 4096)
_GUARD_BYTES = 64


def plain_copy(target: int, source: int, nbytes: int) -> None:
    """Copies with the C library; other threads of Python run meanwhile."""
    ctypes.memmove(target, source, nbytes)


@functools.cache
def byte_copy() -> ByteCopy:
    """Returns the cheapest way to copy many bytes on the calling thread; chosen and tested once."""
    # Elsewhere ISA-L has no streaming stores, and memmove is as good.
    if platform.machine() in ("x86_64", "AMD64"):
        for path in library_paths():
            try:
                copy = StreamingCopy(path)
            except (OSError, AttributeError) as error:
                log.debug("no streaming copies by %s: %s", path, error)
                continue
            if copies_right(copy):
                return copy
            log.error("%s copies wrong bytes and is not used", path)
    return plain_copy


class StreamingCopy:
    """Copies with streaming stores, by ISA-L from the library at `path`.

    Any address and length will do; what is not aligned is copied as always.

    Raises: OSError: no library there.  AttributeError: it is not ISA-L's.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)  # releases the interpreter's lock during every call
        initialize = library.gf_vect_mul_init
        initialize.argtypes, initialize.restype = [ctypes.c_ubyte, ctypes.c_void_p], None
        self._multiply = library.gf_vect_mul
        self._multiply.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._multiply.restype = ctypes.c_int
        self._by_one = np.zeros(_TABLE_BYTES, dtype=np.uint8)
        self._table = self._by_one.ctypes.data
        initialize(1, self._table)

    def __call__(self, target: int, source: int, nbytes: int) -> None:
        # Streaming stores are ordered before what this thread does next: taking the interpreter's
        # lock again is a locked instruction, which drains them.
        fits = nbytes <= _MOST_BYTES and not (target | source) % _ALIGNED_BYTES
        streamed = nbytes - nbytes % _ALIGNED_BYTES if fits else 0
        if streamed and self._multiply(streamed, self._table, source, target):
            streamed = 0  # refused; nothing was written
        if streamed < nbytes:
            ctypes.memmove(target + streamed, source + streamed, nbytes - streamed)


def copies_right(copy: ByteCopy) -> bool:
    """Whether `copy` writes the bytes that it should, and no others."""
    room = max(_TEST_LENGTHS) + 2 * _GUARD_BYTES
    space = np.zeros(2 * room + _ALIGNED_BYTES, dtype=np.uint8)
    shift = -space.ctypes.data % _ALIGNED_BYTES
    source, target = space[shift : shift + room], space[shift + room :][:room]
    source[:] = (np.arange(room) * 167 + 13).astype(np.uint8)  # 167 is odd: every byte value occurs
    for length in _TEST_LENGTHS:
        target[:] = 0xA5
        inside = slice(_GUARD_BYTES, _GUARD_BYTES + length)
        copy(target[inside].ctypes.data, source[inside].ctypes.data, length)
        expected = np.full(room, 0xA5, dtype=np.uint8)
        expected[inside] = source[inside]
        if not np.array_equal(target, expected):
            return False
    return True
