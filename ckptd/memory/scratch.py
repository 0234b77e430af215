"""A thread's own blocks to work in: their pages are touched once, and mostly stay in the cache."""

from __future__ import annotations

import threading

import numpy as np

from ckptd.memory.bulk import BLOCK_BYTES

_own = threading.local()


def blocks(count: int) -> list[memoryview]:
    """This thread's first `count` blocks of `BLOCK_BYTES` each; what they hold is anything."""
    if not hasattr(_own, "blocks"):
        _own.blocks = []
    held: list[memoryview] = _own.blocks
    while len(held) < count:
        held.append(np.empty(BLOCK_BYTES, np.uint8).data)
    return held[:count]
