"""Calls of a store that may fail for a while: deadlines, tries with jitter, and a budget of retries.

Nothing here knows the time, or is random: both are arguments, and so is the wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from ckptd.errors import CkptdError, DeadlineExceeded, Unreachable

T = TypeVar("T")

# A store that does not answer: that says nothing of what is in it.
SILENT: Final = (Unreachable, DeadlineExceeded)


class Failed(Exception):
    """One try that failed.

    Args:
        error: what the user is told if no try succeeds.
        again: another try may end otherwise.
        code: the store's own name of it, such as "PreconditionFailed".
    """

    def __init__(self, error: CkptdError, *, again: bool, code: str = "") -> None:
        super().__init__(str(error))
        self.error = error
        self.again = again
        self.code = code


@dataclass(frozen=True)
class Policy:
    """How long and how often a store is asked.  A try ends after `try_s` and the time its bytes may take."""

    tries: int = 10
    try_s: float = 30.0
    total_s: float = 300.0  # of one call with all of its tries, and the time its bytes may take
    slowest_bytes_per_s: float = 1 << 20  # below this a transfer counts as stuck
    first_pause_s: float = 0.1
    most_pause_s: float = 20.0
    budget: float = 100.0  # retries that may be owed at a time, by all calls together
    earned: float = 0.1  # retries that a success pays back

    def __post_init__(self) -> None:
        if self.tries < 1 or min(self.try_s, self.total_s, self.slowest_bytes_per_s) <= 0:
            raise ValueError("tries, deadlines and the slowest rate must be greater than 0")
        if self.first_pause_s > self.most_pause_s or self.first_pause_s < 0:
            raise ValueError("a pause is at least 0, and grows from the first to the most")

    def pause_s(self, failures: int, share: float) -> float:
        """Returns how long to wait after so many failures; `share` in [0, 1) is the jitter.

        The whole pause is random: callers that failed together do not come back together.
        """
        ceiling = min(self.most_pause_s, self.first_pause_s * 2.0 ** min(failures - 1, 60))
        return ceiling * share


class Budget:
    """Retries that are left.  A store that is down gets few of them from many callers; thread-safe."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._left = policy.budget
        self._lock = threading.Lock()

    @property
    def left(self) -> float:
        return self._left

    def spend(self) -> bool:
        """Takes a retry; returns whether there was one."""
        with self._lock:
            if self._left < 1:
                return False
            self._left -= 1
            return True

    def earn(self) -> None:
        with self._lock:
            self._left = min(self._policy.budget, self._left + self._policy.earned)


class Retrying:
    """Tries calls until one succeeds, the deadline passes, or the budget is used up; thread-safe.

    Args:
        clock: seconds, monotonic.
        sleep: waits so many seconds.
        random: a number in [0, 1).
    """

    def __init__(
        self,
        policy: Policy,
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        random: Callable[[], float],
    ) -> None:
        self.policy = policy
        self.budget = Budget(policy)
        self.clock = clock
        self.sleep = sleep
        self.random = random

    def call(
        self,
        what: str,
        attempt: Callable[[float], T],
        *,
        settle: Callable[[], T | None] | None = None,
        nbytes: int = 0,
    ) -> T:
        """Returns what `attempt` returns, given the seconds that it may take, once it does not fail.

        Args:
            what: begins the message of an error, such as "x cannot be written to s3://b".
            settle: looks whether the thing was done after all; returns its result, or None.  Needed where
                doing it twice is not the same as doing it once: any answer may be lost, and the second try
                refused for the first one's sake.  Even the first failure may be of a second try: aiohttp
                sends a put again by itself when a connection that was used before breaks.
            nbytes: how much is moved; it gets the time that it may take.

        Raises:
            CkptdError: the error of the first fatal failure.
            DeadlineExceeded: the deadline passed.
            Unreachable: tries or budget are used up.
        """
        policy, began = self.policy, self.clock()
        allowance = nbytes / policy.slowest_bytes_per_s
        end = began + policy.total_s + allowance
        failures = 0
        while True:
            left = end - self.clock()
            try:
                result = attempt(max(0.001, min(policy.try_s + allowance, left)))
            except Failed as failed:
                failures += 1
                error = self._next(what, failed, failures, end, began)
                if error is None:
                    continue
                done = settle() if settle is not None else None
                if done is not None:
                    return done
                raise error from failed
            self.budget.earn()
            return result

    def _next(self, what: str, failed: Failed, failures: int, end: float, began: float) -> CkptdError | None:
        """Waits for the next try, or returns why there is none."""
        if not failed.again:
            return failed.error
        pause = self.policy.pause_s(failures, self.random())
        why = f"{failed.error}; tried {failures} times in {self.clock() - began:.1f} s"
        if self.clock() + pause >= end:
            return DeadlineExceeded(what, why, "see whether the store answers, and try again")
        if failures >= self.policy.tries:
            return Unreachable(what, why, "see whether the store answers, and try again")
        if not self.budget.spend():
            return Unreachable(
                what,
                f"{why}; too many calls of this process fail to try again",
                "see whether the store answers",
            )
        self.sleep(pause)
        return None
