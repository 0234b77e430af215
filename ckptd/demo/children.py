"""Child processes of the demo: started in sessions of their own, watched by pidfd, ended for certain."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ckptd.demo import warden
from ckptd.demo.forkserver import Forked, ForkServer

TAIL_LINES = 25
REAP_S = 10.0


class Child:
    """One process.  `exited` is done as soon as the process is a zombie, with its status.

    A status is that of waitpid as subprocess gives it: an exit code, or minus the signal.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes] | Forked, log: Path) -> None:
        self.name = name
        self.pid = process.pid
        self.log = log
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @property
    def alive(self) -> bool:
        """Whether the process still exists (stopped ones do)."""
        return not self.exited.done()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, unless the process is gone."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> int:
        """The status, once there is one; cancelling the wait changes nothing."""
        return await asyncio.shield(self.exited)

    async def end(self, grace_s: float) -> int:
        """SIGTERM, and SIGKILL after `grace_s`; returns the status when the process is gone."""
        self.send(signal.SIGTERM)
        await asyncio.wait([self.exited], timeout=grace_s)
        self.send(signal.SIGKILL)
        return await self.wait()

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        status = self._process.wait()  # a readable pidfd: does not block
        os.close(self._pidfd)
        self.exited.set_result(status)


class RecordPipe:
    """A pipe on which a child writes JSON lines; `path` is its name in the child.

    What a killed child had written before is still read to the end.
    """

    def __init__(self, receive: Callable[[dict[str, Any]], None]) -> None:
        self._read, self.write_end = os.pipe()
        self._receive = receive
        self._rest = b""
        os.set_blocking(self._read, False)
        asyncio.get_running_loop().add_reader(self._read, self._pump)

    @property
    def path(self) -> str:
        """The name under which the child opens the pipe (its descriptor is inherited)."""
        return f"/dev/fd/{self.write_end}"

    def handed_over(self) -> None:
        """The child has its copy: ours closes, so that the end of the child is the end of the pipe."""
        os.close(self.write_end)

    def close(self) -> None:
        """Reads nothing more."""
        if self._read >= 0:
            asyncio.get_running_loop().remove_reader(self._read)
            os.close(self._read)
            self._read = -1

    def _pump(self) -> None:
        try:
            data = os.read(self._read, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self.close()
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._receive(json.loads(line))


class Children:
    """All processes of one demo.  Leaving the context ends them, whatever happened."""

    def __init__(self, logs: Path, cwd: Path) -> None:
        self._logs = logs
        self._cwd = cwd
        self._all: list[Child] = []
        self._warden: subprocess.Popen[bytes] | None = None
        self._fork_server: ForkServer | None = None

    async def __aenter__(self) -> Self:
        # start_new_session: a terminal's Ctrl-C reaches the demo only, which then ends the others.
        self._warden = subprocess.Popen(
            [sys.executable, "-I", str(Path(warden.__file__))],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._all:
            child.send(signal.SIGKILL)
        if self._all:
            await asyncio.wait([child.exited for child in self._all], timeout=REAP_S)
        if self._fork_server is not None:
            self._fork_server.close()
        assert self._warden is not None
        assert self._warden.stdin is not None
        self._warden.stdin.close()
        self._warden.wait(REAP_S)

    def guard_directory(self, path: Path) -> None:
        """Removes the directory when the demo is gone, however it ended."""
        self._tell_warden(f"directory {path}")

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Child:
        """Starts a process; its stderr (and stdout, unless given) go to `name`.log."""
        log = self._logs / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                argv,
                env=dict(env),
                cwd=self._cwd,
                stdin=stdin,
                stdout=output if stdout is None else stdout,
                stderr=output,
                pass_fds=tuple(pass_fds),
                start_new_session=True,
            )
        return self._note(name, process, log)

    def preload(self, module: Path, env: Mapping[str, str]) -> None:
        """Forks trainers from now on, from an interpreter that has imported `module`."""
        self._fork_server = ForkServer(module, env, self._logs / "forkserver.log")
        self._tell_warden(f"process {self._fork_server.process.pid}")

    def spawn_trainer(
        self, name: str, argv: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int]
    ) -> Child:
        """As `spawn`, forked where `preload` was called."""
        if self._fork_server is None:
            return self.spawn(name, argv, env, pass_fds=pass_fds)
        log = self._logs / f"{name}.log"
        with log.open("ab") as output, Path(os.devnull).open("rb") as nothing:
            own = {0: nothing.fileno(), 1: output.fileno(), 2: output.fileno()}
            fds = own | {fd: fd for fd in pass_fds}
            return self._note(name, self._fork_server.spawn(argv, env, self._cwd, fds), log)

    def _note(self, name: str, process: subprocess.Popen[bytes] | Forked, log: Path) -> Child:
        self._tell_warden(f"process {process.pid}")
        child = Child(name, process, log)
        self._all.append(child)
        return child

    def _tell_warden(self, line: str) -> None:
        assert self._warden is not None
        assert self._warden.stdin is not None
        self._warden.stdin.write(line.encode() + b"\n")
        self._warden.stdin.flush()


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented, for an error message."""
    try:
        text = log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return "    (no log)"
    return "\n".join(f"    {line}" for line in text[-lines:]) or "    (empty)"
