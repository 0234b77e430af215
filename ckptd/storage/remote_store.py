"""A directory of anything that fsspec knows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from ckptd.image.names import check_name
from ckptd.storage import place
from ckptd.storage.patient import Patient
from ckptd.storage.store import SCRATCH_PREFIX, AlreadyThere, Reader, Store, ends, told

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from typing_extensions import Buffer

_COPY_BYTES: Final = 64 << 20  # of one request to a remote store


class FsspecStore(Store):
    """The files of one of its directories."""

    def __init__(self, fs: AbstractFileSystem, root: str, url: str, patient: Patient | None = None) -> None:
        self._fs = fs
        self._root = root
        self.url = url
        self._patient = patient or Patient()

    def put(self, name: str, pieces: Iterable[Buffer]) -> None:
        path, what = self._path(name), f"{name} cannot be written to {self.url}"
        with told(what):
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
        with told(what):
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
        with told(what):
            info = self._patient(what, lambda: self._fs.info(path))
            if info["type"] != "file":
                raise FileNotFoundError(path)

            def read(start: int, end: int) -> bytes:
                data = self._patient(f"{path} cannot be read", lambda: self._fs.cat_file(path, start, end))
                return bytes(data)

            return _FsspecReader(read, path, info["size"])

    def list(self) -> list[str]:
        what = f"{self.url} cannot be listed"
        with told(what):
            try:
                found = self._patient(what, lambda: self._fs.ls(self._root, detail=False, refresh=True))
            except FileNotFoundError:
                return []
            names = [path.rstrip("/").rpartition("/")[2] for path in found]
            return sorted(name for name in names if not name.startswith(SCRATCH_PREFIX))

    def delete(self, name: str) -> None:
        path, what = self._path(name), f"{name} in {self.url} cannot be removed"
        with told(what), contextlib.suppress(FileNotFoundError):
            self._patient(what, lambda: self._fs.rm_file(path))

    def modified(self, name: str) -> float:
        path, what = self._path(name), f"{name} in {self.url} cannot be looked at"
        with told(what):
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
            with told(f"{self._path} cannot be read"):
                data = self._read(start + at, start + at + len(part))
            if len(data) != len(part):
                raise ends(self._path, start + at + len(data), start + len(into))
            part[:] = data

    def close(self) -> None:
        pass
