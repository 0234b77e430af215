"""Finding the daemon, and starting one where there is none.

The order: `socket=`, CKPTD_SOCKET, the system daemon's socket, the embedded daemon's.
An embedded daemon runs in a session of its own and outlives the trainers that started
it; one per node and user, under a lock.
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ckptd.client.connection import dial
from ckptd.client.settings import Environment
from ckptd.errors import InvalidRequest, Unreachable

log = logging.getLogger("ckptd")

SYSTEM_SOCKET: Final = Path("/run/ckptd/ckptd.sock")
_POLL_S: Final = 0.02
_LOG_TAIL_BYTES: Final = 2000

# Started by this process.  Kept so that nobody collects them: they outlive it.
_started: list[subprocess.Popen[bytes]] = []


def find_daemon(
    socket: str | os.PathLike[str] | None,
    environment: Environment,
    timeout_s: float,
    system: Path = SYSTEM_SOCKET,
) -> Path:
    """Returns the socket of a daemon, after starting an embedded one where none answers.

    A socket that was asked for is returned as it is: there, nobody is started.

    Raises:
        Unreachable: the embedded daemon does not come up.
        InvalidRequest: the runtime directory is not safe.
    """
    if socket is not None:
        return Path(socket)
    if environment.socket is not None:
        return environment.socket
    if answers(system):
        return system
    if system.exists():
        log.warning("the daemon of %s does not answer; looking for an embedded one", system)
    directory = private_directory(environment.runtime_dir)
    endpoint = directory / "ckptd.sock"
    if not answers(endpoint):
        with _locked(directory / "embedded.lock", timeout_s):
            if not answers(endpoint):  # the lock's earlier holder may have started it
                _start(endpoint, environment.memory_dir, directory / "daemon.log", timeout_s)
    return endpoint


def answers(endpoint: Path) -> bool:
    """Whether somebody listens on this socket."""
    try:
        dial(endpoint).close()
    except BlockingIOError:  # its backlog is full
        return True
    except OSError:
        return False
    return True


def private_directory(directory: Path) -> Path:
    """Returns `directory`, made if missing: our own, mode 0700, no symbolic link.

    Raises:
        InvalidRequest: what is there is not.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        pass  # no directory: said below
    except OSError as error:
        raise InvalidRequest(
            f"{directory} cannot be made for the embedded daemon's socket",
            error.strerror or str(error),
            "set XDG_RUNTIME_DIR to a directory of your own",
        ) from error
    stat = directory.lstat()
    mode = stat.st_mode & 0o777
    if directory.is_symlink() or not directory.is_dir() or stat.st_uid != os.getuid() or mode != 0o700:
        raise InvalidRequest(
            f"{directory} cannot hold the embedded daemon's socket",
            f"it must be a directory of uid {os.getuid()} with mode 700; "
            f"found uid {stat.st_uid}, mode {mode:o}{', a symbolic link' if directory.is_symlink() else ''}",
            "remove it, or set XDG_RUNTIME_DIR",
        )
    return directory


def _start(endpoint: Path, memory_dir: Path, log_path: Path, timeout_s: float) -> None:
    command = [sys.executable, "-m", "ckptd.cli.main", "daemon", "--embedded"]
    command += ["--socket", str(endpoint), "--memory-dir", str(memory_dir)]
    deadline = time.monotonic() + timeout_s
    with log_path.open("ab") as errors:
        offset = errors.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
    _started.append(process)
    while not answers(endpoint):
        code = process.poll()
        if code is not None or time.monotonic() >= deadline:
            why = (
                f"it ended with code {code}"
                if code is not None
                else f"it did not answer within {timeout_s:g} s"
            )
            raise Unreachable(
                "the embedded daemon did not start",
                f"{why}: {_tail(log_path, offset)}",
                f"see {log_path}, or start one with `ckptd daemon --socket {endpoint}`",
            )
        time.sleep(_POLL_S)


def _tail(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        file.seek(max(offset, path.stat().st_size - _LOG_TAIL_BYTES))
        return file.read().decode(errors="replace").strip() or "its log is empty"


@contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[None]:
    deadline = time.monotonic() + timeout_s
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Unreachable(
                        "another process is starting the embedded daemon", f"it holds {path}"
                    ) from None
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)
