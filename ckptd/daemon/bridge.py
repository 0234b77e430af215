"""From the threads of the bulk plane to the event loop, where state lives."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from ckptd.daemon.job import Job
from ckptd.daemon.settings import DaemonSettings
from ckptd.errors import DeadlineExceeded, NotFound, Unreachable
from ckptd.v1 import bulk_pb2

T = TypeVar("T")


class Bridge:
    """Carries questions of bulk threads to the loop, and looks up what a frame is about."""

    def __init__(
        self, settings: DaemonSettings, jobs: Mapping[str, Job], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._loop = loop

    def on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` on the loop; called from a bulk thread.

        Raises:
            DeadlineExceeded: the loop is too busy.
            Unreachable: the daemon is ending.
        """
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError as error:  # the loop is closed
            work.close()
            raise Unreachable(f"node {self._settings.node} has ended") from error
        try:
            return future.result(self._settings.bulk_timeout_s)
        except TimeoutError as error:
            future.cancel()
            raise DeadlineExceeded(f"node {self._settings.node} is too busy") from error
        except CancelledError as error:
            raise Unreachable(f"node {self._settings.node} is ending") from error

    def tell(self, call: Callable[..., object], *arguments: object) -> None:
        """Has the loop call this soon; a daemon that has ended need not know any more."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, *arguments)

    def job_of(self, frame: bulk_pb2.BulkHeader) -> Job:
        """The job of a peer's frame; on the loop.

        Raises:
            NotFound: no such job here, or this node has not heard of the frame's generation yet.
            StaleGeneration: the frame is of an older generation.
        """
        job = self._jobs.get(frame.header.job)
        if job is None:
            raise NotFound(f"node {self._settings.node} has no job {frame.header.job}")
        if frame.header.generation < job.generation:
            raise job.stale(frame.header.generation)
        if frame.header.generation > job.generation:
            # Our directive is still on its way; the peer tries again.
            raise NotFound(f"node {self._settings.node} is still at generation {job.generation}")
        return job
