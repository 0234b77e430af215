"""How far a long command is, on stderr and on a terminal only: data on stdout stays data, logs stay short."""

from __future__ import annotations

import sys
import time
from typing import Final

_EVERY_S: Final = 0.5


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
        self.say(f"{size(done)} of {size(total)}, {100 * done // max(total, 1)}%")

    def say(self, text: str) -> None:
        """Shows this, unless something was shown a moment ago."""
        now = time.monotonic()
        if not self._terminal or now - self._said < _EVERY_S:
            return
        self._said, self._drawn = now, True
        sys.stderr.write(f"\r\x1b[K{self._what}: {text}")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the line off the terminal."""
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
