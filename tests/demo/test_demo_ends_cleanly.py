"""However the demo ends, it leaves no process and no memory behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckptd.demo import example
from ckptd.demo.killer import MEMORY_PREFIX

DEADLINE_S = 60.0


def left_behind(pid: int) -> list[str]:
    """Processes and memory of the demo that ran as `pid`."""
    mark = f"{MEMORY_PREFIX}{pid}-"
    found = [str(path) for path in Path("/dev/shm").glob(f"{mark}*")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_until_clean(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while left := left_behind(pid):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_demo_that_is_ended_takes_everything_with_it(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    environment = {"PYTHONPATH": str(example.PACKAGE_PARENT), "TMPDIR": str(tmp_path)}
    argv = [sys.executable, "-m", "ckptd.cli.main", "demo", "--seed", "1", "--json"]
    demo = subprocess.Popen(
        argv,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in its background has them ignore it, and what they start, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert demo.stderr is not None
    with demo:
        for line in demo.stderr:
            if "daemons serve" in line:
                break
        assert len(left_behind(demo.pid)) > 5, "nothing was running yet"
        demo.send_signal(number)
        out, _ = demo.communicate(timeout=DEADLINE_S)
    assert demo.returncode == status
    assert out == "", "an unfinished demo has no result"
    wait_until_clean(demo.pid)
