"""Calls of any fsspec file system, with the deadlines and retries of `retrying`.

Such a call cannot be broken off: one that is late goes on in a thread that nobody waits for.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from ckptd.errors import CkptdError
from ckptd.storage.retrying import Failed, Policy, Retrying

T = TypeVar("T")

# What another try does not change, and what callers look for.
_FINAL: Final = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError,
)  # fmt: skip
_FINAL_NUMBERS: Final = {errno.ENOSPC, errno.EDQUOT, errno.EINVAL, errno.EROFS, errno.ENAMETOOLONG}


class Patient:
    """Calls functions until they succeed; thread-safe."""

    def __init__(self, retrying: Retrying | None = None) -> None:
        self._retrying = retrying or Retrying(
            Policy(), clock=time.monotonic, sleep=time.sleep, random=random.random
        )

    def __call__(self, what: str, function: Callable[[], T]) -> T:
        """Returns what `function` returns.  It is called again after errors that may pass.

        Args:
            what: begins the message of an error.

        Raises:
            OSError: one that does not pass, as `function` raised it.
            DeadlineExceeded, Unreachable: there were too many of the others, or no answer.
        """

        def attempt(deadline_s: float) -> T:
            try:
                return within(deadline_s, function)
            except _FINAL:
                raise
            except OSError as error:
                if error.errno in _FINAL_NUMBERS:
                    raise
                raise Failed(CkptdError(what, str(error) or type(error).__name__), again=True) from error

        return self._retrying.call(what, attempt)

    def once(self, function: Callable[[], T], nbytes: int = 0) -> T:
        """Returns what `function` returns, which cannot be called twice.  Raises TimeoutError when late."""
        policy = self._retrying.policy
        return within(policy.try_s + nbytes / policy.slowest_bytes_per_s, function)


def within(deadline_s: float, function: Callable[[], T]) -> T:
    """Returns what `function` returns within this time.  Raises TimeoutError, or what it raises."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001  # it is raised in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="ckptd-store", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer in {deadline_s:.1f} s")
    return results[0]
