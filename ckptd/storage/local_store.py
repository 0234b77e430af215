"""A directory of a local or POSIX file system: the system calls in the order that makes files durable."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from ckptd.errors import NotFound
from ckptd.storage import place
from ckptd.storage.store import SCRATCH_PREFIX, AlreadyThere, Reader, Store, ends, told

if TYPE_CHECKING:
    from typing_extensions import Buffer

_WRITE_BYTES: Final = 8 << 20  # of one system call
_MAX_SMALL_BYTES: Final = 64 << 20  # what `put_if_absent` is for


class LocalStore(Store):
    """A directory of a local or POSIX file system.

    Order of a put: scratch file, write, fsync, rename, fsync of the directory.  What an fsync failed for is
    given up, never synced again: the kernel may have dropped the pages and call them clean.
    """

    _unsure: ClassVar[set[Path]] = set()  # files whose directory could not be synced behind their creation

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)
        self._anchored = False  # the entries of this directory and of those above it are durable

    def put(self, name: str, pieces: Iterable[Buffer]) -> None:
        with self._scratch(name, pieces) as scratch:
            scratch.replace(self._path(name))
            self._sync_directory()

    def put_if_absent(self, name: str, data: bytes) -> None:
        path, there = self._path(name), False
        with self._scratch(name, [data]) as scratch:
            try:
                os.link(scratch, path)  # fails if the name is taken, where rename would not
            except FileExistsError:
                there = True
                self._renew()
            try:
                self._sync_directory()  # who finds it may rely on it, too: the writer's sync may be to come
            except OSError:
                self._unsure.add(path)
                raise
        if there:
            raise AlreadyThere(f"{name} exists in {self.url}", next="read it")

    def open(self, name: str) -> Reader:
        path = self._path(name)
        with told(f"{path} cannot be opened"):
            return _LocalReader(path)

    def list(self) -> list[str]:
        with told(f"{self.url} cannot be listed"):
            try:
                return sorted(
                    path.name for path in self.root.iterdir() if not path.name.startswith(SCRATCH_PREFIX)
                )
            except FileNotFoundError:
                return []

    def delete(self, name: str) -> None:
        with told(f"{name} in {self.url} cannot be removed"):
            self._path(name).unlink(missing_ok=True)
            if self.root.is_dir():
                self._sync_directory()

    def modified(self, name: str) -> float:
        with told(f"{name} in {self.url} cannot be looked at"):
            return self._path(name).stat().st_mtime

    def settle(self) -> None:
        self._renew()
        with told(f"{self.url} cannot be synced"):
            self._sync_directory()
            self._anchor()

    def touched(self) -> float:
        with told(f"{self.url} cannot be looked at"):
            if not self.root.is_dir():
                return 0.0
            return max(path.lstat().st_mtime for path in (self.root, *self.root.iterdir()))

    def remove(self, before: float) -> None:
        with told(f"{self.url} cannot be removed"):
            if not self.root.is_dir():
                return
            for path in self.root.glob(f"{SCRATCH_PREFIX}*"):
                if path.stat().st_mtime < before:
                    path.unlink(missing_ok=True)
            if next(self.root.iterdir(), None) is None:
                self.root.rmdir()
                _sync(self.root.parent)

    def inside(self, name: str) -> LocalStore:
        return LocalStore(self._path(name))

    def _path(self, name: str) -> Path:
        return Path(place.join(self.url, name))

    @contextlib.contextmanager
    def _scratch(self, name: str, pieces: Iterable[Buffer]) -> Iterator[Path]:
        """Yields a synced file with these bytes; it is gone afterwards unless it was moved."""
        self._path(name)
        scratch = self.root / f"{SCRATCH_PREFIX}{os.getpid()}-{os.urandom(6).hex()}"
        with told(f"{name} cannot be written to {self.url}"):
            self._make()
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                try:
                    for piece in pieces:
                        _write_all(descriptor, memoryview(piece).cast("B"))
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                yield scratch
            finally:
                # The first error is the one to tell.
                with contextlib.suppress(OSError):
                    scratch.unlink(missing_ok=True)

    def _make(self) -> None:
        """Makes this directory; its own name is durable when this returns, whoever made it."""
        missing = [path for path in (self.root, *self.root.parents) if not path.is_dir()]
        synced: set[Path] = set()
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            try:
                _sync(path.parent)
                synced.add(path.parent)
            except OSError:
                with contextlib.suppress(OSError):
                    path.rmdir()  # the next try makes it anew
                raise
        self._anchor(synced)

    def _anchor(self, synced: Collection[Path] = ()) -> None:
        """Makes this directory's own name durable, and those above it, once.

        Whoever made one of them may have died, or been told an error, before its sync.
        """
        path, device = self.root, self.root.stat().st_dev
        while not self._anchored and path != path.parent and path.parent.stat().st_dev == device:
            path = path.parent
            if path not in synced:
                with contextlib.suppress(PermissionError):  # such a parent is not ours to look after
                    _sync(path)
        self._anchored = True

    def _renew(self) -> None:
        """Puts anew what could not be synced in its place: then there is something to sync."""
        for path in [path for path in tuple(self._unsure) if path.parent == self.root]:
            with contextlib.suppress(NotFound):
                self.put(path.name, [self.read(path.name, _MAX_SMALL_BYTES)])
            self._unsure.discard(path)

    def _sync_directory(self) -> None:
        _sync(self.root)


class _LocalReader(Reader):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            self.size = os.fstat(self._descriptor).st_size
        except OSError:
            self.close()
            raise

    def read_into(self, start: int, into: memoryview) -> None:
        at = 0
        while at < len(into):
            with told(f"{self._path} cannot be read"):
                count = os.preadv(self._descriptor, [into[at:]], start + at)
            if count == 0:
                raise ends(str(self._path), start + at, start + len(into))
            at += count

    def close(self) -> None:
        # Whatever the system says, the number is free from here on, and may soon be another file's.
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # of what was read, it says nothing
                os.close(descriptor)


def _write_all(descriptor: int, view: memoryview) -> None:
    at = 0
    while at < len(view):
        at += os.write(descriptor, view[at : at + _WRITE_BYTES])


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
