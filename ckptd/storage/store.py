"""Where files are kept: a small interface, and what implements it.

A store holds the files of one directory.  Files are written once and never changed; a reader sees a file
whole or not at all.  `open_store` chooses: local paths are handled here with the system calls in the right
order, everything else goes through fsspec.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from ckptd.errors import CkptdError, CorruptCheckpoint, InvalidRequest, NoSpace, NotFound
from ckptd.image.names import check_name
from ckptd.storage import place
from ckptd.storage.patient import Patient

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from typing_extensions import Buffer

SCRATCH_PREFIX: Final = ".ckptd-part-"  # of files that are not there yet
_WRITE_BYTES: Final = 8 << 20  # of one system call
_COPY_BYTES: Final = 64 << 20  # of one request to a remote store


class AlreadyThere(CkptdError):
    """Another writer was first; nothing was changed."""


class Reader(ABC):
    """An open file of a store; usable from several threads."""

    size: int  # bytes

    @abstractmethod
    def read_into(self, start: int, into: memoryview) -> None:
        """Fills `into` with the bytes from `start` on.

        Raises:
            CorruptCheckpoint: the file ends before.
        """

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Store(ABC):
    """The files of one directory.  Names are checked by every method (`place.join`).

    Raises (all methods):
        NoSpace: the disk or the quota is full; what was written is removed.
        InvalidRequest: a name cannot be used.
        CkptdError: the store refused otherwise.
    """

    url: str

    @abstractmethod
    def put(self, name: str, pieces: Iterable[Buffer]) -> None:
        """Writes a file of these pieces; durable, and in place, when this returns.  Replaces an older one."""

    @abstractmethod
    def put_if_absent(self, name: str, data: bytes) -> None:
        """Writes a small file unless there is one.

        Raises:
            AlreadyThere: there is one.
        """

    @abstractmethod
    def open(self, name: str) -> Reader:
        """Opens a file.

        Raises:
            NotFound: there is none.
        """

    @abstractmethod
    def list(self) -> list[str]:
        """Returns the names of files and directories in ascending order; [] where nothing is.

        Scratch files of writers are left out.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Removes a file; fine if there is none."""

    def modified(self, name: str) -> float:
        """Returns when a file was written, in seconds since 1970 by the store's clock.

        Raises:
            NotFound: there is none.
        """
        raise CkptdError(f"{self.url} does not tell when its files were written")

    def settle(self) -> None:  # noqa: B027  # what most stores show is durable
        """Makes durable what `list` shows: its writer's sync may be still to come, or have failed."""

    def touched(self) -> float:
        """Returns when anything in this directory was last written, scratch files too; 0 for nothing."""
        return max((self.modified(name) for name in self.list()), default=0.0)

    def remove(self, before: float) -> None:  # noqa: B027  # a store without directories has none to remove
        """Removes this directory if nothing is in it but what writers left that died before that time."""

    @abstractmethod
    def inside(self, name: str) -> Store:
        """Returns the store of a directory in this one."""

    def read(self, name: str, most: int) -> bytes:
        """Returns a small file's content.

        Raises:
            NotFound: there is none.
            CorruptCheckpoint: it is longer than `most` bytes.
        """
        with self.open(name) as reader:
            if reader.size > most:
                raise CorruptCheckpoint(
                    f"{name} in {self.url} cannot be read",
                    f"it has {reader.size} bytes, at most {most} are read",
                    "use another checkpoint",
                )
            data = bytearray(reader.size)
            reader.read_into(0, memoryview(data))
            return bytes(data)


def open_store(url: str) -> Store:
    """Returns the store of a directory, given as a path or any fsspec URL.

    Raises:
        InvalidRequest: there is no such kind of store.
    """
    local = url.removeprefix("file://") if url.startswith("file://") else url
    if "://" not in local and "::" not in local:
        return LocalStore(Path(local).absolute())
    if url.startswith(("s3://", "s3a://")):
        from ckptd.storage.s3 import open_s3  # s3fs takes its time to import

        return open_s3(url)
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InvalidRequest(
            f"the store {url} cannot be opened", str(error), "install the package that it names"
        ) from error
    return FsspecStore(fs, root, url)


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
        with _told(f"{path} cannot be opened"):
            return _LocalReader(path)

    def list(self) -> list[str]:
        with _told(f"{self.url} cannot be listed"):
            try:
                return sorted(
                    path.name for path in self.root.iterdir() if not path.name.startswith(SCRATCH_PREFIX)
                )
            except FileNotFoundError:
                return []

    def delete(self, name: str) -> None:
        with _told(f"{name} in {self.url} cannot be removed"):
            self._path(name).unlink(missing_ok=True)
            if self.root.is_dir():
                self._sync_directory()

    def modified(self, name: str) -> float:
        with _told(f"{name} in {self.url} cannot be looked at"):
            return self._path(name).stat().st_mtime

    def settle(self) -> None:
        self._renew()
        with _told(f"{self.url} cannot be synced"):
            self._sync_directory()
            self._anchor()

    def touched(self) -> float:
        with _told(f"{self.url} cannot be looked at"):
            if not self.root.is_dir():
                return 0.0
            return max(path.lstat().st_mtime for path in (self.root, *self.root.iterdir()))

    def remove(self, before: float) -> None:
        with _told(f"{self.url} cannot be removed"):
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
        with _told(f"{name} cannot be written to {self.url}"):
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
                self.put(path.name, [self.read(path.name, _COPY_BYTES)])
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
            with _told(f"{self._path} cannot be read"):
                count = os.preadv(self._descriptor, [into[at:]], start + at)
            if count == 0:
                raise _ends(str(self._path), start + at, start + len(into))
            at += count

    def close(self) -> None:
        # Whatever the system says, the number is free from here on, and may soon be another file's.
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # of what was read, it says nothing
                os.close(descriptor)


class FsspecStore(Store):
    """A directory of anything that fsspec knows."""

    def __init__(self, fs: AbstractFileSystem, root: str, url: str, patient: Patient | None = None) -> None:
        self._fs = fs
        self._root = root
        self.url = url
        self._patient = patient or Patient()

    def put(self, name: str, pieces: Iterable[Buffer]) -> None:
        path, what = self._path(name), f"{name} cannot be written to {self.url}"
        with _told(what):
            self._patient(what, lambda: self._fs.makedirs(self._root, exist_ok=True))
            # Leaving by an exception would still close, and so commit, what was written until then.
            target = self._patient(what, lambda: self._fs.open(path, "wb"))
            nbytes = 0
            try:
                for piece in pieces:
                    data = bytes(piece)
                    nbytes += len(data)
                    self._patient.once(functools.partial(target.write, data), len(data))
            except BaseException:
                target.discard()
                # Some file systems show a file from its first byte on; without a manifest it is
                # nothing, but litter.
                with contextlib.suppress(OSError):
                    self._fs.rm_file(path)
                raise
            # Most file systems send what they hold only now.
            self._patient.once(target.close, nbytes)

    def put_if_absent(self, name: str, data: bytes) -> None:
        path, what = self._path(name), f"{name} cannot be written to {self.url}"
        with _told(what):
            self._patient(what, lambda: self._fs.makedirs(self._root, exist_ok=True))
            tries = []

            def create() -> None:
                tries.append(1)
                self._fs.pipe_file(path, data, mode="create")

            try:
                self._patient(what, create)
            except FileExistsError as error:
                # An earlier try of ours may have made it, and the answer was lost.
                if len(tries) > 1 and self.read(name, len(data)) == data:
                    return
                raise AlreadyThere(f"{name} exists in {self.url}", next="read it") from error

    def open(self, name: str) -> Reader:
        path = self._path(name)
        what = f"{name} in {self.url} cannot be opened"
        with _told(what):
            info = self._patient(what, lambda: self._fs.info(path))
            if info["type"] != "file":
                raise FileNotFoundError(path)

            def read(start: int, end: int) -> bytes:
                data = self._patient(f"{path} cannot be read", lambda: self._fs.cat_file(path, start, end))
                return bytes(data)

            return _FsspecReader(read, path, info["size"])

    def list(self) -> list[str]:
        what = f"{self.url} cannot be listed"
        with _told(what):
            try:
                found = self._patient(what, lambda: self._fs.ls(self._root, detail=False, refresh=True))
            except FileNotFoundError:
                return []
            names = [path.rstrip("/").rpartition("/")[2] for path in found]
            return sorted(name for name in names if not name.startswith(SCRATCH_PREFIX))

    def delete(self, name: str) -> None:
        path, what = self._path(name), f"{name} in {self.url} cannot be removed"
        with _told(what), contextlib.suppress(FileNotFoundError):
            self._patient(what, lambda: self._fs.rm_file(path))

    def modified(self, name: str) -> float:
        path, what = self._path(name), f"{name} in {self.url} cannot be looked at"
        with _told(what):
            return float(self._patient(what, lambda: self._fs.modified(path)).timestamp())

    def remove(self, before: float) -> None:
        if not self.list():
            with contextlib.suppress(OSError):  # most have no directories
                self._fs.rmdir(self._root)

    def inside(self, name: str) -> FsspecStore:
        check_name("directory", name)
        return FsspecStore(
            self._fs, f"{self._root.rstrip('/')}/{name}", place.join(self.url, name), self._patient
        )

    def _path(self, name: str) -> str:
        return place.join(self._root, name)


class _FsspecReader(Reader):
    def __init__(self, read: Callable[[int, int], bytes], path: str, size: int) -> None:
        self._read = read
        self._path = path
        self.size = size

    def read_into(self, start: int, into: memoryview) -> None:
        for at in range(0, len(into), _COPY_BYTES):
            part = into[at : at + _COPY_BYTES]
            with _told(f"{self._path} cannot be read"):
                data = self._read(start + at, start + at + len(part))
            if len(data) != len(part):
                raise _ends(self._path, start + at + len(data), start + len(into))
            part[:] = data

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Makes what the system says one of our errors."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(what, "there is no such file", "ckptd ls shows what there is") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(what, os.strerror(error.errno), "free space, or choose another store") from error
        raise CkptdError(what, str(error), "look at the store") from error


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


def _ends(path: str, found: int, wanted: int) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{path} is truncated", f"it ends at byte {found}, {wanted} were expected", "use another checkpoint"
    )
