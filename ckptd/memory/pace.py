"""A bandwidth bound that several threads share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pace:
    """Lets at most `bytes_per_s` pass, on average since the last pause; 0: no bound.

    Args:
        clock, sleep: seconds; arguments for tests.
    """

    def __init__(
        self,
        bytes_per_s: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        # When everything that was let pass so far has passed at the bound's speed.
        self._free_at = 0.0

    @property
    def bounded(self) -> bool:
        return self._bytes_per_s > 0

    def take(self, nbytes: int) -> None:
        """Returns when `nbytes` may pass."""
        if not self.bounded:
            return
        with self._lock:
            now = self._clock()
            turn = max(now, self._free_at)
            self._free_at = turn + nbytes / self._bytes_per_s
        if turn > now:
            self._sleep(turn - now)
