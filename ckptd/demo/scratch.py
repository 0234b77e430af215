"""The demo's places: logs on disk, nodes' memory on tmpfs; and what dead demos left behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckptd.demo.killer import MEMORY_PREFIX
from ckptd.demo.options import ResolvedOptions
from ckptd.errors import NoSpace
from ckptd.memory import budget

SHM = Path("/dev/shm")
SLOTS = 3
# Weights and two moments in float32 of examples/gpt, and what else is in an image.
STATE_BYTES = 8 << 20
IMAGE_EXTRA_BYTES = 1 << 19


@dataclass
class Scratch:
    """Where this demo puts things; `memory` and `logs` exist."""

    root: Path
    memory: Path
    # The logs stay, unless the demo says that nobody needs them.
    keep_logs: bool = True

    @property
    def logs(self) -> Path:
        return self.root / "logs"


@contextmanager
def scratch(options: ResolvedOptions) -> Iterator[Scratch]:
    """Makes the places; removes them afterwards, except the logs of a demo that failed.

    Raises:
        NoSpace: /dev/shm cannot hold what the nodes will hold.
    """
    remove_stale(SHM)
    check_space(options, SHM)
    prefix = f"{MEMORY_PREFIX}{os.getpid()}-"
    root = Path(tempfile.mkdtemp(prefix=prefix))
    memory = Path(tempfile.mkdtemp(prefix=prefix, dir=SHM))
    lock = _locked(memory)
    (root / "logs").mkdir()
    places = Scratch(root, memory)
    try:
        yield places
    except KeyboardInterrupt:
        places.keep_logs = False
        raise
    finally:
        if not places.keep_logs:
            shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)
        os.close(lock)


def memory_limit_bytes(options: ResolvedOptions) -> int:
    """What each node's daemon may take: the nodes share one tmpfs, which real ones do not."""
    image = STATE_BYTES // options.nodes + IMAGE_EXTRA_BYTES
    return budget.needed_bytes(image, 1, SLOTS, options.nodes, options.parity)


def check_space(options: ResolvedOptions, shm: Path) -> None:
    """Raises NoSpace where the tmpfs has less room than all nodes of this demo together need."""
    needed = (memory_limit_bytes(options) - budget.TRANSFER_BYTES) * (options.nodes + options.spares)
    stat = os.statvfs(shm)
    free = stat.f_bavail * stat.f_frsize
    if free < needed:
        raise NoSpace(
            f"{shm} is too small for the demo",
            f"its {options.nodes + options.spares} nodes need {needed >> 20} MiB, {free >> 20} MiB are free",
            "make it larger ('mount -o remount,size=1G /dev/shm', or 'docker run --shm-size=1g'), "
            "or use fewer --nodes",
        )


def remove_stale(shm: Path) -> list[Path]:
    """Removes the memory of demos that are dead; returns what it removed.

    A demo is dead when nobody holds its lock: a process id can mean another process by now.
    """
    removed = []
    for memory in shm.glob(f"{MEMORY_PREFIX}*"):
        if memory.stat().st_uid != os.getuid() or _alive(memory):
            continue
        try:
            lock = _locked(memory)
        except OSError:
            continue
        shutil.rmtree(memory, ignore_errors=True)
        os.close(lock)
        removed.append(memory)
    return removed


def _alive(memory: Path) -> bool:
    """Whether the process in the name exists: it may be about to take its lock."""
    pid = memory.name.removeprefix(MEMORY_PREFIX).partition("-")[0]
    return not pid.isdecimal() or Path(f"/proc/{pid}").exists()


def _locked(memory: Path) -> int:
    """A descriptor of the directory, locked for as long as it is open.

    Raises:
        OSError: another process has the lock, or the directory is gone.
    """
    descriptor = os.open(memory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
