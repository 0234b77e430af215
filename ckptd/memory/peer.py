"""The sending side towards one peer: a queue, one thread, one connection.

Work is done in order.  When the connection breaks, the thread reconnects and asks
its owner to queue again whatever the peer may have lost; every frame may safely
be sent twice.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ckptd.errors import CkptdError
from ckptd.memory.bulk import Connection, yield_to_training

log = logging.getLogger("ckptd.peer")

_WATCH_S = 0.1  # how soon a lost idle connection is noticed


@dataclass(frozen=True)
class Work:
    """Something to send; it is skipped when nobody wants it any more."""

    send: Callable[[Connection], None]
    wanted: Callable[[], bool]


class Peer:
    """Sends work to one address.

    Args:
        on_state: called from the thread with True when the connection stands and
            False when it is lost.
        on_reconnected: called from the thread after a lost connection stands again.
    """

    def __init__(
        self,
        name: str,
        address: str,
        *,
        timeout_s: float,
        nice: int,
        on_state: Callable[[bool], None],
        on_reconnected: Callable[[], None],
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._nice = nice
        self._on_state = on_state
        self._on_reconnected = on_reconnected
        self._queue: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._connection: Connection | None = None
        self._was_lost = False
        self._thread = threading.Thread(target=self._run, name=f"bulk-to-{name}", daemon=True)
        self._thread.start()

    def enqueue(self, work: Work) -> None:
        """Queues work; returns at once."""
        self._queue.put(work)

    def close(self) -> None:
        """Ends the thread; queued work is dropped."""
        self._closed.set()
        connection = self._connection
        if connection is not None:
            connection.close()

    def _run(self) -> None:
        yield_to_training(self._nice)
        work: Work | None = None
        while not self._closed.is_set():
            try:
                connection = self._connected()
                if connection is None:
                    continue
                if work is None:
                    work = self._next()
                if work is not None and work.wanted():
                    work.send(connection)
                work = None
            except CkptdError as error:
                # A refusal leaves the connection half read, so it ends like a broken one.
                log.debug("to %s: %s", self.address, error)
                self._lose()
                self._closed.wait(_WATCH_S / 2)
            except Exception:
                log.exception("sending to %s failed", self.address)
                self._lose()
                work = None
        self._lose()

    def _next(self) -> Work | None:
        try:
            return self._queue.get(timeout=_WATCH_S)
        except queue.Empty:
            return None

    def _connected(self) -> Connection | None:
        if self._connection is not None:
            if self._connection.alive():
                return self._connection
            self._lose()
        try:
            self._connection = Connection.open(self.address, self._timeout_s)
        except CkptdError:
            self._lose()
            self._closed.wait(_WATCH_S / 2)
            return None
        self._on_state(True)
        if self._was_lost:
            self._was_lost = False
            self._on_reconnected()
        return self._connection

    def _lose(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if not self._was_lost and not self._closed.is_set():
            self._was_lost = True
            self._on_state(False)
