"""The one background thread: copies behind the fence, finishes snapshots, gets the daemon back.

It starts with the first job, not before: a trainer that forks its data loaders first
forks no thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable

log = logging.getLogger("ckptd")

Job = Callable[[], None]
_POLL_S = 0.001
_NICE = 1  # a fence may wait for it, so it must not starve


class Copier:
    """Runs jobs in order, and finishes waiting things as they become ready."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        # Each returns whether it is done; called again after every job, and every
        # millisecond where it waits for a device, which nobody announces.
        self._waiting: list[tuple[Callable[[], bool], bool]] = []

    @property
    def started(self) -> bool:
        return self._thread is not None

    def submit(self, job: Job) -> None:
        """Queues a job; the first one starts the thread."""
        self._jobs.put(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ckptd-copier", daemon=True)
            self._thread.start()

    def finish_later(self, attempt: Callable[[], bool], *, polled: bool) -> None:
        """Called from a job: `attempt` is called until it returns True."""
        self._waiting.append((attempt, polled))

    def poke(self) -> None:
        """Something that a waiting attempt looks at has changed."""
        if self._thread is not None:
            self._jobs.put(lambda: None)

    def close(self, timeout_s: float) -> None:
        """Ends the thread after the jobs that are queued."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join(timeout_s)

    def _run(self) -> None:
        # On Linux niceness belongs to the thread: what is copied behind training yields to it.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while True:
            polled = any(polled for _, polled in self._waiting)
            try:
                job = self._jobs.get(timeout=_POLL_S if polled else None)
            except queue.Empty:
                job = _nothing
            if job is None:
                return
            try:
                job()
                self._waiting = [(attempt, polled) for attempt, polled in self._waiting if not attempt()]
            except Exception:
                # The thread's top frame.  Jobs void their own snapshot when they fail; what comes
                # here is a mistake of ours, and must not end protection for good.
                log.exception("a job of ckptd's copier failed")


def _nothing() -> None:
    """A turn without a job."""
