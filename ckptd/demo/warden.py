"""The warden: ends every process of a demo and frees its memory when the demo itself is gone.

It runs as a file, with the standard library only, in a session of its own.  Its
stdin is a pipe whose only writer is the demo, so however the demo ends, even by
SIGKILL, the pipe closes.  Lines: `process PID`, `directory PATH`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path

DIRECTORY_PREFIX = "ckptd-demo-"


def watch() -> None:
    """Collects until stdin ends, then kills what still lives and removes the directories."""
    processes: list[int] = []  # pidfds: they keep meaning the same process
    directories: list[Path] = []
    for line in sys.stdin:
        word, _, rest = line.rstrip("\n").partition(" ")
        if word == "process":
            with contextlib.suppress(ProcessLookupError):
                processes.append(os.pidfd_open(int(rest)))
        elif word == "directory":
            directories.append(Path(rest))
    for pidfd in processes:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    for directory in directories:
        if directory.name.startswith(DIRECTORY_PREFIX):
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch()
