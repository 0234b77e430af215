"""Verified blocks that were read a moment ago, so that small reads of neighbours cost one read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from ckptd.image.digest_table import BLOCK_BYTES

CACHE_BYTES: Final = 64 << 20


class BlockCache:
    """The newest verified blocks of one checkpoint, by (object, block); bounded in bytes."""

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self._limit = limit_bytes // BLOCK_BYTES
        self._blocks: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, obj: int, first: int, count: int) -> list[bytes] | None:
        """Returns the blocks first .. first + count - 1, if all are here."""
        with self._lock:
            keys = [(obj, block) for block in range(first, first + count)]
            if any(key not in self._blocks for key in keys):
                return None
            for key in keys:
                self._blocks.move_to_end(key)
            return [self._blocks[key] for key in keys]

    def put(self, obj: int, first: int, verified: memoryview) -> None:
        """Keeps verified blocks; the oldest make room."""
        with self._lock:
            for at in range(0, len(verified), BLOCK_BYTES):
                self._blocks[obj, first + at // BLOCK_BYTES] = bytes(verified[at : at + BLOCK_BYTES])
            while len(self._blocks) > self._limit:
                self._blocks.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._blocks.clear()
