"""The demo: a real training job, something killed without warning, and not one bit of difference.

`run(options)` is what `ckptd demo` calls.  It is the reference for a launcher, too:
`ckptd.demo.launcher` obeys a daemon's orders and confirms them.
"""

from __future__ import annotations

from ckptd.demo.options import KILLS, DemoOptions
from ckptd.demo.result import DemoResult

__all__ = ["KILLS", "DemoOptions", "DemoResult", "run"]


def run(options: DemoOptions) -> DemoResult:
    """Runs the demo and returns its figures; the picture goes to stderr.

    Raises:
        InvalidRequest: the options contradict each other.
        NoSpace: /dev/shm is too small.
        DemoFailed: a part of the demo did not do what it must; the message shows its log.
        DeadlineExceeded: a part of the demo took too long; the message says which.
    """
    from ckptd.demo.story import run as story  # grpc and rich are needed from here on only

    return story(options)
