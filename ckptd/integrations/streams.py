"""File objects over a store: one that verifies what it reads, one that digests what it writes."""

from __future__ import annotations

import io
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from ckptd.image.digest_table import BLOCK_BYTES
from ckptd.storage.fetch import CHUNK_BYTES, read_verified
from ckptd.storage.store import Reader

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PIECE_BYTES: Final = 4 << 20
_PIECES: Final = 4  # so many wait for the store at most
_Piece = bytes | None  # None: the end


class VerifiedFile(io.RawIOBase):
    """A stored file, read block by block; no byte of a damaged block is passed on.

    Raises (when read):
        CorruptCheckpoint: a block does not match its digest, or the file ends before.
    """

    def __init__(self, reader: Reader, digests: bytes, name: str) -> None:
        super().__init__()
        self._reader = reader
        self._digests = digests
        self._name = name
        self._at = 0
        self._first = -1  # where the staged blocks begin
        self._staged = memoryview(b"")

    @classmethod
    def buffered(cls, reader: Reader, digests: bytes, name: str) -> io.BufferedReader:
        """Returns such a file for readers of small pieces."""
        return io.BufferedReader(cls(reader, digests, name), CHUNK_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._reader.size}[whence]
        if base + offset < 0:
            raise ValueError(f"{self._name} has no byte {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, into: Buffer) -> int:
        view = memoryview(into).cast("B")
        done = 0
        while done < len(view) and self._at < self._reader.size:
            inside = self._stage(self._at)
            part = self._staged[inside : inside + len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)
            self._at += len(part)
        return done

    def close(self) -> None:
        if not self.closed:
            self._reader.close()
            self._staged = memoryview(b"")
        super().close()

    def _stage(self, at: int) -> int:
        """Reads and verifies the blocks around byte `at`; returns where it is among them."""
        if not (self._first >= 0 and self._first <= at < self._first + len(self._staged)):
            first = at // BLOCK_BYTES * BLOCK_BYTES
            fresh = memoryview(bytearray(min(CHUNK_BYTES, self._reader.size - first)))
            self._first = -1
            read_verified(self._reader, first, fresh, self._digests, self._name)
            self._first, self._staged = first, fresh
        return at - self._first


class Discarded(Exception):
    """The writer gave up; the store removes what it has of the file."""


class _Pump:
    """Carries pieces from a file object that is written to a store that asks for them.

    It does not know the file object, so that one that is forgotten is collected, and discards itself.
    """

    def __init__(self, put: Callable[[Iterable[bytes]], None]) -> None:
        self._put = put
        self._pieces: queue.Queue[_Piece | Discarded] = queue.Queue(_PIECES)
        self._ended = False
        self.error: BaseException | None = None
        # A daemon: a file that is open when the interpreter ends is not waited for.
        self._thread = threading.Thread(target=self._run, name="ckptd-write", daemon=True)
        self._thread.start()

    def send(self, piece: _Piece | Discarded) -> None:
        self._pieces.put(piece)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self._put(self._taken())
        except BaseException as error:  # noqa: BLE001  # the thread's top frame; told by `error`
            self.error = error
            while not self._ended:  # the other side must never wait for a store that has failed
                self._ended = not isinstance(self._pieces.get(), bytes)

    def _taken(self) -> Iterator[bytes]:
        while (piece := self._next()) is not None:
            yield piece

    def _next(self) -> bytes | None:
        piece = self._pieces.get()
        self._ended = not isinstance(piece, bytes)
        if isinstance(piece, Discarded):
            raise piece
        return piece


class WrittenFile(io.BufferedIOBase):
    """A file that is there, whole and durable, when `close` returns; left by an exception, it never is.

    Args:
        put: stores pieces as the file's content; called in a thread of its own.
    """

    def __init__(self, put: Callable[[Iterable[bytes]], None]) -> None:
        super().__init__()
        self.name = ""  # its path, for who opened it
        self._waiting = bytearray()
        self._nbytes = 0
        self._synced = -1
        self._pump: _Pump | None = _Pump(put)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._nbytes

    def write(self, data: Buffer) -> int:
        """Raises what the store has raised."""
        if self._pump is None:
            raise ValueError("write to a closed file")
        if self._pump.error is not None:
            error = self._pump.error
            self.discard()
            raise error
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), _PIECE_BYTES):
            self._waiting += view[begin : begin + _PIECE_BYTES]
            if len(self._waiting) >= _PIECE_BYTES:
                self._pump.send(bytes(self._waiting))
                self._waiting.clear()
        self._nbytes += len(view)
        return len(view)

    def fileno(self) -> int:
        """Returns a descriptor that may be synced, and is nothing else.

        DCP syncs its files before it closes them, and the whole machine (`os.sync`) where there is no
        descriptor.  Here `close` makes the file durable.
        """
        if self._synced < 0:
            self._synced = os.memfd_create("ckptd-sync", os.MFD_CLOEXEC)
        return self._synced

    def close(self) -> None:
        """Raises what the store has raised; then there is no file."""
        if self._pump is not None:
            pump = self._pump
            pump.send(bytes(self._waiting))
            pump.send(None)
            self._end(pump)
            if pump.error is not None:
                raise pump.error

    def commit(self) -> None:
        """What fsspec calls at the end of a transaction."""
        self.close()

    def discard(self) -> None:
        """Gives the file up; nothing of it stays."""
        if self._pump is not None:
            pump = self._pump
            pump.send(Discarded())
            self._end(pump)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def __del__(self) -> None:
        # The base class would close, and so keep, a file that was not finished.
        # At the end of the interpreter the thread is gone, and is not waited for.
        if getattr(self, "_pump", None) is not None and not sys.is_finalizing():
            self.discard()

    def _end(self, pump: _Pump) -> None:
        self._pump = None
        pump.join()
        if self._synced >= 0:
            os.close(self._synced)
            self._synced = -1
        super().close()
