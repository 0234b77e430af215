"""How a run ends: closed, by an error, with its process; and what a forked child has of it.

Importing this module hooks it into the interpreter: its end, its forks, and errors that
nobody caught.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import weakref
from types import TracebackType

from ckptd.client.copier import Copier
from ckptd.client.link import Link
from ckptd.client.protection import Protection
from ckptd.v1 import local_pb2

_LEAVE_S = 5.0
_REASON_CHARACTERS = 100
_endings: weakref.WeakSet[Ending] = weakref.WeakSet()


class Ending:
    """The ends that one run may come to; lives as long as the run does.

    Invariant: a run is armed until it comes to the first of them; then the others do nothing.
    """

    def __init__(self, protection: Protection, copier: Copier, link: Link, timeout_s: float) -> None:
        self.armed = True
        self._protection = protection
        self._copier = copier
        self._link = link
        self._timeout_s = timeout_s
        _endings.add(self)

    def close(self, *, park: bool) -> None:
        """The user is done: finishes the snapshot under way; the memory is given back, or kept (`park`)."""
        if self.armed:
            self.armed = False
            self._protection.close(time.monotonic() + self._timeout_s)
            self._copier.close(self._timeout_s)
            self._link.close(park=None if self._link.fatal is not None else park)

    def fail(self, error: BaseException) -> None:
        """This process ends because of an error: the job hears of it before the interpreter is done.

        What it captured stays, and may be resumed from.
        """
        if self.armed:
            self.leave()
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:_REASON_CHARACTERS]
            self._link.tell(local_pb2.TrainerMessage(failing=local_pb2.Failing(reason=reason)), _LEAVE_S)
            self._link.flush(_LEAVE_S)
            self._link.close(park=None)

    def leave(self) -> None:
        """The process ends without close(): finishes the snapshot under way; the daemon keeps the memory."""
        if self.armed:
            self.armed = False
            self._protection.capture.finish(time.monotonic() + _LEAVE_S)
            self._copier.close(_LEAVE_S)

    def disarm(self) -> None:
        """In a forked child: the hooks do nothing, and the socket is the parent's alone."""
        self.armed = False
        self._link.disarm()


def _disarm_all() -> None:
    for ending in list(_endings):
        ending.disarm()


def _leave_all() -> None:
    """At the interpreter's end: no thread of ours may be inside torch when it goes."""
    for ending in list(_endings):
        ending.leave()


def _fail_all(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What nobody caught ends the process: every run says so, then the error is shown as always."""
    for ending in list(_endings):
        ending.fail(error)
    _shown_by(kind, error, trace)


_shown_by = sys.excepthook
sys.excepthook = _fail_all
os.register_at_fork(after_in_child=_disarm_all)
atexit.register(_leave_all)
