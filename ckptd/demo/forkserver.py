"""Starts trainers by forking an interpreter that has torch imported already.

Importing torch takes seconds of processor time in every process; a test that starts a
dozen trainers pays for it once.  This file is both ends: `ForkServer` in the demo, and,
run as a script, the server, which imports no ckptd (the control's processes must not).

A trainer is forked twice, so that it is nobody's child and falls to the demo, which has
made itself the subreaper: pids, signals and statuses are then those of a child.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_MESSAGE_BYTES = 1 << 20
_FDS = 16
_START_S = 60.0


@dataclass(frozen=True)
class Forked:
    """A forked process, with what the demo needs of subprocess.Popen."""

    pid: int

    def wait(self) -> int:
        """The status as Popen.wait gives it: an exit code, or minus the signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class ForkServer:
    """The demo's end.

    Args:
        preload: a Python file; it is imported by the server, under its name.
        env: of the server; a process gets its own.
    """

    def __init__(self, preload: Path, env: Mapping[str, str], log: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_START_S)
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "this process cannot become a subreaper")
        with theirs, log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-I", __file__, str(theirs.fileno()), str(preload)],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._socket = ours

    def spawn(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, fds: Mapping[int, int]) -> Forked:
        """Runs `argv` (interpreter, script, arguments) in a session of its own.

        Args:
            fds: descriptor there -> descriptor here.
        """
        request = {"argv": list(argv), "env": dict(env), "cwd": str(cwd), "fds": list(fds)}
        socket.send_fds(self._socket, [json.dumps(request).encode()], list(fds.values()))
        return Forked(int(self._socket.recv(_MESSAGE_BYTES)))

    def close(self) -> None:
        """Ends the server; what it started goes on."""
        self._socket.close()
        self.process.wait(_START_S)


def _serve(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Serves until the demo is gone, then returns None; in a forked trainer, returns its request."""
    while True:
        data, fds, _, _ = socket.recv_fds(sock, _MESSAGE_BYTES, _FDS)
        if not data:
            return None
        read, write = os.pipe()
        middle = os.fork()
        if middle == 0:
            os.setsid()
            trainer = os.fork()
            if trainer:
                os.write(write, str(trainer).encode())
                os._exit(0)
            sock.close()
            os.close(read)
            os.close(write)
            return json.loads(data), fds
        os.waitpid(middle, 0)  # from here on, the trainer is the demo's child
        sock.send(os.read(read, 32))
        for fd in (read, write, *fds):
            os.close(fd)


def _become(request: dict[str, Any], fds: list[int]) -> None:
    """Puts this process into the place that the request describes."""
    targets = request["fds"]
    beyond = max(targets) + 1
    # Out of the way first: a descriptor may have come under a number that another one shall get.
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, beyond) for fd in fds]
    for fd, target in zip(moved, targets, strict=True):
        os.dup2(fd, target)
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    added = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[1:1] = added
    sys.argv = request["argv"][1:]


def _main() -> None:
    preload = Path(sys.argv[2])
    sys.path.insert(0, str(preload.parent))
    importlib.import_module(preload.stem)
    importlib.import_module("torch._dynamo")  # the first optimizer imports it
    found = _serve(socket.socket(fileno=int(sys.argv[1])))
    if found is not None:
        _become(*found)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _main()
