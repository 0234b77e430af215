"""Protection yields to training: the scheduler's side of it."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path


def yield_to_training(nice: int) -> None:
    """Lowers the calling thread's priority: on Linux niceness belongs to the thread."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def yield_session_to_training(nice: int) -> None:
    """Lowers the priority of this process's session, where the kernel schedules sessions (autogroup).

    There, niceness counts among the threads of one session only, and a daemon mostly has one of its own
    (sched(7)).  A session that others share is left alone.
    """
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(nice))
