"""How far a long command is, on stderr: data on stdout stays data."""

from __future__ import annotations

import sys
import time
from typing import Final

_EVERY_S: Final = 1.0  # on a terminal
_EVERY_LOGGED_S: Final = 15.0  # in a log


class Progress:
    """Called with (bytes done, bytes in all); says so now and then.

    Args:
        what: what is done, for the line.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._terminal = sys.stderr.isatty()
        self._said = time.monotonic()
        self._drawn = False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said < (_EVERY_S if self._terminal else _EVERY_LOGGED_S):
            return
        self._said = now
        line = f"{self._what}: {size(done)} of {size(total)}, {100 * done // max(total, 1)}%"
        self._drawn = self._terminal
        sys.stderr.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Takes the line off a terminal."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = False


def size(nbytes: int) -> str:
    """Returns bytes for people."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
