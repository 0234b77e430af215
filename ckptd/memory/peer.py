"""The sending side towards one peer: a queue, one thread, one connection.

Work is done in order.  When the connection breaks, or the peer refuses, the queue is
dropped; the thread reconnects and asks its owner to queue again whatever the peer may
lack, in its right order.  Every frame may safely be sent twice.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ckptd.errors import CkptdError
from ckptd.memory.bulk import Connection, Refusal
from ckptd.memory.yielding import yield_to_training

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
        on_reconnected: called from the thread when a connection stands again after
            queued work was dropped.
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
        self._lost = False
        self._dropped = False  # queued work is gone, and its owner has not been told
        self._refused = ""  # what the peer said last, so that it is logged once
        self._thread = threading.Thread(target=self._run, name=f"bulk-to-{name}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether nobody answers there, as far as is known."""
        return self._lost

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
        while not self._closed.is_set():
            try:
                connection = self._connected()
                work = self._next() if connection is not None else None
                if connection is not None and work is not None and work.wanted():
                    work.send(connection)
            except Refusal as error:
                # Both ends have stopped in the middle; the peer itself is well.
                if str(error) != self._refused:
                    self._refused = str(error)
                    log.info("%s refused: %s", self.address, error)
                self._drop()
                self._closed.wait(_WATCH_S / 2)
            except CkptdError as error:
                log.debug("to %s: %s", self.address, error)
                self._lose()
                self._closed.wait(_WATCH_S / 2)
            except Exception:
                log.exception("sending to %s failed", self.address)
                self._lose()
                self._closed.wait(_WATCH_S / 2)
        self._drop()

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
        self._lost = False
        self._on_state(True)
        if self._dropped:
            self._dropped = False
            self._on_reconnected()
        return self._connection

    def _lose(self) -> None:
        self._drop()
        if not self._lost and not self._closed.is_set():
            self._lost = True
            self._on_state(False)

    def _drop(self) -> None:
        """Ends the connection and empties the queue, so that retries do not pile up in it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._dropped = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
