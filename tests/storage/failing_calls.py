"""Every file call of this process below one directory: counted, recorded, and made to fail where a test says.

    with FileCalls(root, Fault("EIO", at=17)) as calls:
        ...
    calls.events                       # what was called, in order, and how it ended

The functions of `os` are replaced, through which the local store and pathlib reach the system.  That nothing
reaches it by another way is compared with strace and with Python's audit events (`python failing_calls.py`
runs the scripts for that).  Nothing is really synced: whoever wants to know what a crash leaves
takes the events to `crash_states`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from unittest import mock

_ONE_PATH: Final = (
    "stat", "lstat", "mkdir", "rmdir", "unlink", "remove", "scandir", "listdir", "access", "chmod",
    "chown", "utime", "truncate", "readlink", "statvfs", "mkfifo", "getxattr", "setxattr", "listxattr",
)  # fmt: skip
_TWO_PATHS: Final = ("link", "rename", "replace", "symlink")
_DESCRIPTOR: Final = (
    "fsync", "fdatasync", "fstat", "close", "lseek", "ftruncate", "fchmod", "posix_fallocate",
    "posix_fadvise", "lockf", "fdopen", "dup", "copy_file_range", "sendfile", "splice",
)  # fmt: skip
_WRITES: Final = ("write", "pwrite", "writev", "pwritev")
_READS: Final = ("read", "readv", "pread", "preadv")
_ALL: Final = ("open", *_ONE_PATH, *_TWO_PATHS, *_DESCRIPTOR, *_WRITES, *_READS)
CHANGES: Final = frozenset(
    {"open", "mkdir", "rmdir", "unlink", "remove", *_TWO_PATHS, "fsync", "fdatasync", *_WRITES}
)
_TAKES_SPACE: Final = frozenset({"mkdir", *_TWO_PATHS, "fsync", "fdatasync", *_WRITES})
_SYNCS: Final = ("fsync", "fdatasync")


class Killed(BaseException):
    """The process is dead from here on: nothing that it still does has any effect."""


@dataclass
class Event:
    """One call."""

    name: str
    path: str
    handle: int = 0  # counts opened files; 0 for calls by path
    other: str = ""  # the second path
    offset: int = 0  # bytes
    data: bytes = b""  # that were written
    creates: bool = False
    directory: bool = False  # opened as one
    error: int = 0  # errno; 0 for success
    injected: bool = False  # the error, or a short count, is ours

    @property
    def changes(self) -> bool:
        """Whether the call may change what is on the disk."""
        return self.name in CHANGES and (self.name != "open" or self.creates)


@dataclass(frozen=True)
class Fault:
    """What happens to the call `at`, and to all later ones if `forever`.

    Kinds: EIO fails any call; ENOSPC those that take space; full writes half, and has no space from there on;
    fsync fails as a disk does that lost what it was given; short does half of what was asked, as a
    signal may; kill ends the process before the call, for ever.
    """

    kind: str
    at: int
    forever: bool = False

    def hits(self, event: Event) -> bool:
        """Whether this kind of fault can befall such a call."""
        match self.kind:
            case "EIO" | "kill":
                return True
            case "ENOSPC":
                return event.name in _TAKES_SPACE or event.creates
            case "full":
                return event.name in _WRITES
            case "fsync":
                return event.name in _SYNCS
            case "short":
                return event.name in (*_WRITES, *_READS)
        raise ValueError(f"no fault is called {self.kind!r}")


KINDS: Final = ("EIO", "ENOSPC", "full", "fsync", "short", "kill")


def faults(kind: str, clean: Sequence[Event]) -> Iterator[Fault]:
    """All faults of a kind that a run can meet whose calls, without faults, are `clean`."""
    for at, event in enumerate(clean):
        if Fault(kind, at).hits(event):
            if kind not in ("full", "kill"):  # these go on for ever
                yield Fault(kind, at)
            yield Fault(kind, at, forever=True)


class FileCalls:
    """Replaces the functions of `os` while the block runs; not for several threads.

    Invariant: descriptors below `root` that are open are in `held`; calls that concern nothing below `root`
    go through as they are, and are not recorded.
    """

    def __init__(self, root: Path, fault: Fault | None = None) -> None:
        self.events: list[Event] = []
        self.held: dict[int, Event] = {}  # by descriptor: the call that opened it
        self.inside = 0  # greater than 0 while one of the replaced functions is at work
        self._root = str(root)
        self._fault = fault
        self._position: dict[int, int] = {}
        self._handles = 0
        self._patches = ExitStack()

    def __enter__(self) -> FileCalls:
        real = {name: getattr(os, name) for name in _ALL if hasattr(os, name)}
        for name, function in real.items():
            self._patches.enter_context(mock.patch.object(os, name, self._replacement(name, function)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patches.close()
        if isinstance(error, Killed):  # the system closes what a dead process had open
            for descriptor in self.held:
                os.close(descriptor)
            self.held.clear()

    @property
    def hit(self) -> list[Event]:
        """The calls that the fault befell."""
        return [event for event in self.events if event.injected]

    def synced_again(self) -> list[str]:
        """Regular files that were synced once more after a sync of them had failed."""
        failed: set[str] = set()
        again = []
        for event in self.events:
            if event.name in _SYNCS and not event.directory:
                again += [event.path] if event.path in failed else []
                failed |= {event.path} if event.error else set()
        return again

    def _replacement(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*args: Any, **named: Any) -> Any:
            event = self._event(name, args, named)
            if event is None:
                return real(*args, **named)
            self.events.append(event)
            self.inside += 1
            try:
                return self._do(event, real, args, named)
            except OSError as error:
                event.error = event.error or error.errno or errno.EIO
                raise
            finally:
                self.inside -= 1

        return replaced

    def _event(self, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Event | None:
        if name in (*_DESCRIPTOR, *_WRITES, *_READS):
            opened = self.held.get(args[0])
            if opened is None:
                return None
            return Event(name, opened.path, opened.handle, directory=opened.directory)
        paths = [os.fspath(arg) if not isinstance(arg, int) else "" for arg in args[:2]]
        if name in _TWO_PATHS:
            below = any(map(self._below, paths))
            return Event(name, paths[0], other=paths[1]) if below else None
        if not args or not self._below(paths[0]):
            return None
        assert "dir_fd" not in named, f"{name} by a directory's descriptor is not recorded yet"
        flags = args[1] if name == "open" else 0
        return Event(name, paths[0], creates=bool(flags & os.O_CREAT), directory=bool(flags & os.O_DIRECTORY))

    def _below(self, path: str | bytes) -> bool:
        text = os.fsdecode(path)
        return text == self._root or text.startswith(self._root + "/")

    def _do(self, event: Event, real: Callable[..., Any], args: Any, named: Any) -> Any:
        number = len(self.events) - 1
        fault = self._fault
        if fault is not None and fault.hits(event) and (number == fault.at or self._later(number, fault)):
            event.injected = True
            return self._fail(fault, event, real, args)
        return self._through(event, real, args, named)

    @staticmethod
    def _later(number: int, fault: Fault) -> bool:
        return fault.forever and number > fault.at

    def _fail(self, fault: Fault, event: Event, real: Callable[..., Any], args: Any) -> Any:
        if fault.kind == "kill":
            event.error = errno.EINTR
            raise Killed
        if fault.kind == "short":
            return self._half(event, real, args)
        first = len(self.hit) == 1
        if fault.kind == "full" and first:
            return self._half(event, real, args)
        event.error = errno.ENOSPC if fault.kind in ("ENOSPC", "full") else errno.EIO
        if event.name == "close":  # whatever it says, the descriptor is gone
            self._through(event, real, args, {})
        raise OSError(event.error, os.strerror(event.error), event.path)

    def _half(self, event: Event, real: Callable[..., Any], args: Any) -> Any:
        """Does half of what was asked, one byte at least."""
        if event.name in _WRITES:
            data = memoryview(args[1]).cast("B")
            return self._through(event, real, (args[0], data[: (len(data) + 1) // 2], *args[2:]), {})
        if event.name == "preadv":
            into = memoryview(args[1][0])
            return real(args[0], [into[: (len(into) + 1) // 2]], *args[2:])
        return real(args[0], (args[1] + 1) // 2, *args[2:])

    def _through(self, event: Event, real: Callable[..., Any], args: Any, named: Any) -> Any:
        if event.name in _SYNCS:
            return None
        if event.name in _WRITES:
            assert event.name in ("write", "pwrite"), f"{event.name} is not recorded yet"
            event.offset = args[2] if event.name == "pwrite" else self._position[args[0]]
            count = real(*args, **named)
            event.data = bytes(memoryview(args[1]).cast("B")[:count])
            if event.name == "write":
                self._position[args[0]] += count
            return count
        result = real(*args, **named)
        if event.name == "open":
            self._handles += 1
            event.handle = self._handles
            self.held[result] = event
            self._position[result] = 0
        elif event.name == "close":
            del self.held[args[0]]
        return result


def tree(root: Path) -> dict[str, bytes | None]:
    """Returns what lies below a directory: relative path -> content, None for a directory."""
    found: dict[str, bytes | None] = {}
    for path in sorted(root.rglob("*")):
        directory = stat.S_ISDIR(path.lstat().st_mode)
        found[str(path.relative_to(root))] = None if directory else path.read_bytes()
    return found
