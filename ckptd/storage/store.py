"""Where files are kept: a small interface, and what implements it.

A store holds the files of one directory.  Files are written once and never changed; a reader sees a file
whole or not at all.  `open_store` chooses: local paths are handled by the system calls in the right order
(`local_store`), S3 by its own operations (`s3`), everything else goes through fsspec (`remote_store`).
"""

from __future__ import annotations

import contextlib
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ckptd.errors import CkptdError, CorruptCheckpoint, InvalidRequest, NoSpace, NotFound

if TYPE_CHECKING:
    from typing_extensions import Buffer

SCRATCH_PREFIX: Final = ".ckptd-part-"  # of files that are not there yet


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
        from ckptd.storage.local_store import LocalStore

        return LocalStore(Path(local).absolute())
    if url.startswith(("s3://", "s3a://")):
        from ckptd.storage.s3 import open_s3  # s3fs takes its time to import

        return open_s3(url)
    import fsspec

    from ckptd.storage.remote_store import FsspecStore

    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InvalidRequest(
            f"the store {url} cannot be opened", str(error), "install the package that it names"
        ) from error
    return FsspecStore(fs, root, url)


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Makes what the system says one of our errors."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(what, "there is no such file", "ckptd ls shows what there is") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(what, os.strerror(error.errno), "free space, or choose another store") from error
        raise CkptdError(what, str(error), "look at the store") from error


def ends(path: str, found: int, wanted: int) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{path} is truncated", f"it ends at byte {found}, {wanted} were expected", "use another checkpoint"
    )
