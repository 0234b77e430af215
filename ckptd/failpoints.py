"""Places where a test may kill this very process: a crash at any of them must lose nothing.

`failpoint(name)` does nothing unless the environment named a directory when the process
started (`CKPTD_FAILPOINTS`, for tests alone).  Then the process that finds a file of that name
there, with its own pid in it, takes the file away and ends as SIGKILL ends it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Where a trainer may die, in the order of a step's life.
TRAINER = (
    "trainer.cut",  # a step is due, and nothing of it is written
    "trainer.volatile",  # what moves is copied, and nothing else
    "trainer.copying",  # some of the quiescent tensors are copied
    "trainer.copied",  # the image lies complete, and nobody was told
    "trainer.told",  # the daemon was told
    "trainer.fenced",  # an optimizer may change its tensors
    "trainer.stepped",  # run.step() is done
)
# Where a daemon may die.
DAEMON = (
    "daemon.captured",  # an image came in, and is not digested
    "daemon.digested",  # it is digested, and no record says so
    "daemon.record-written",  # a record lies under its scratch name
    "daemon.record-renamed",  # a record is in place
    "daemon.sealed",  # the node's seal is recorded, and nobody was told
    "daemon.sending",  # some cells went out
    "daemon.receiving",  # some cells came in
    "daemon.folding",  # all cells are in, and the parity is not digested
    "daemon.folded",  # it is digested, and no record says so
    "daemon.releasing",  # a holding's record is gone, and its slots are still taken
)
# Where a daemon may die before it serves.
STARTING = (
    "daemon.adopting",  # a holding of its predecessor is read and verified, and others are not
)
NAMES = frozenset(TRAINER + DAEMON + STARTING)

_directory = os.environ.get("CKPTD_FAILPOINTS", "")


def failpoint(name: str) -> None:
    """Ends this process here if a test wants it to."""
    if _directory:
        _strike(name)


def _strike(name: str) -> None:
    assert name in NAMES, name
    armed = Path(_directory) / name
    try:
        wanted = armed.read_text()
    except OSError:
        return
    if wanted == str(os.getpid()):
        armed.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
