"""The killer: a process of its own that strikes when its clock says so.

It runs as a file, with the standard library only, and knows nothing of the job but
process ids and directories.  One JSON line on stdin is one order; one JSON line on
stdout says what was done and when, in CLOCK_MONOTONIC seconds.

An order: {"at_s": 12.5, "signals": [[pid, "SIGKILL"], ...], "remove": ["/dev/shm/ckptd-demo-.../node1"]}
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

# What may be removed is a node's memory directory inside the memory of a demo, nothing else.
MEMORY_PREFIX = "ckptd-demo-"


def strike(order: dict[str, Any]) -> dict[str, Any]:
    """Waits for the order's time, sends its signals, removes its directories.

    Returns:
        `struck_s` (taken before the first signal), `missing` (pids that were gone).
    """
    for name in order["remove"]:
        if not Path(name).parent.name.startswith(MEMORY_PREFIX):
            raise ValueError(f"{name} is not a node's memory in a demo: it stays")
    signals = [(int(pid), signal.Signals[name]) for pid, name in order["signals"]]
    _sleep_until(float(order["at_s"]))
    struck_s = time.monotonic()
    missing = [pid for pid, number in signals if not _send(pid, number)]
    for name in order["remove"]:
        # A dying daemon can still unlink its own files at this moment.
        shutil.rmtree(name, ignore_errors=True)
    return {"struck_s": struck_s, "missing": missing}


def _sleep_until(at_s: float) -> None:
    while (left := at_s - time.monotonic()) > 0:
        time.sleep(left)


def _send(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(strike(json.loads(line))), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
