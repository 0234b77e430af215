"""Frames on the daemon's UNIX socket: bounded, never blocking unless asked to wait.

A frame is a 4-byte little-endian length and one protobuf message; descriptors come
with the frame that announces them (proto/ckptd/v1/local.proto).  What is sent goes
into a bounded buffer first, so that a daemon that does not read cannot stop training.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from array import array
from collections import deque
from pathlib import Path
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from ckptd import errors
from ckptd.v1 import common_pb2, local_pb2

MAX_FRAME_BYTES: Final = 16 << 20
MAX_UNSENT_BYTES: Final = 1 << 20
_LENGTH: Final = struct.Struct("<I")
_READ_BYTES: Final = 1 << 16
_FD_BYTES: Final = array("i").itemsize
_CLOSE_ON_EXEC: Final = socket.MSG_CMSG_CLOEXEC
_FDS_BYTES: Final = socket.CMSG_SPACE(8 * _FD_BYTES)

_ERRORS: Final[dict[int, type[errors.CkptdError]]] = {
    common_pb2.ERROR_CODE_INVALID: errors.InvalidRequest,
    common_pb2.ERROR_CODE_PROTOCOL: errors.ProtocolMismatch,
    common_pb2.ERROR_CODE_STALE_GENERATION: errors.StaleGeneration,
    common_pb2.ERROR_CODE_RANK_TAKEN: errors.RankTaken,
    common_pb2.ERROR_CODE_NO_SPACE: errors.NoSpace,
    common_pb2.ERROR_CODE_NOT_OWNER: errors.InvalidRequest,
    common_pb2.ERROR_CODE_NOT_FOUND: errors.NotFound,
    common_pb2.ERROR_CODE_TIMEOUT: errors.DeadlineExceeded,
    common_pb2.ERROR_CODE_CORRUPT: errors.CorruptImage,
    common_pb2.ERROR_CODE_UNRECOVERABLE: errors.NotEnoughCells,
}


class ConnectionLost(Exception):
    """The daemon is gone, or does not read."""


class Arrival(NamedTuple):
    """A message and the descriptor that came with it; whoever takes it closes the descriptor."""

    message: local_pb2.DaemonMessage
    fd: int | None


def error_of(failure: local_pb2.Failure) -> errors.CkptdError:
    """Returns the failure as the error that the user sees."""
    error = failure.error
    return _ERRORS.get(error.code, errors.CkptdError)(error.what, error.why, error.next)


def dial(path: Path) -> socket.socket:
    """Returns a connected socket; takes no time, whoever listens.

    Raises:
        OSError: nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


class Connection:
    """One connection.  Sending is safe from any thread; receiving belongs to one at a time."""

    def __init__(self, sock: socket.socket, job: str, generation: int) -> None:
        self.job = job
        self.generation = generation
        self._sock = sock
        self._unsent = bytearray()
        self._send_lock = threading.Lock()
        self._received = bytearray()
        self._read_into = memoryview(bytearray(_READ_BYTES))
        self._fds: deque[int] = deque()
        self._closed = False

    def send(self, message: local_pb2.TrainerMessage, timeout_s: float) -> None:
        """Queues a frame and sends what can be sent without waiting.

        Raises:
            ConnectionLost: the daemon is gone, or 1 MiB lies unread.
        """
        message.header.job = self.job
        message.header.generation = self.generation
        message.header.timeout_ms = max(1, int(timeout_s * 1000))
        text = message.SerializeToString()
        assert len(text) <= MAX_FRAME_BYTES
        with self._send_lock:
            self._unsent += _LENGTH.pack(len(text)) + text
            self._flush()
            if len(self._unsent) > MAX_UNSENT_BYTES:
                raise ConnectionLost("the daemon does not read its socket")

    def take(self) -> Arrival | None:
        """Returns the next message if one is here, without waiting.

        Raises:
            ConnectionLost: the daemon is gone, and all it sent was taken.
            ProtocolMismatch: these are no frames of ours.
        """
        arrival = self._parse()
        while arrival is None and self._read():
            arrival = self._parse()
        return arrival

    def wait(self, deadline: float) -> None:
        """Returns when something can be read, or unsent bytes could be sent, or at `deadline`.

        Args:
            deadline: of time.monotonic().

        Raises:
            ConnectionLost: the daemon is gone.
        """
        with self._send_lock:
            self._flush()
            events = select.POLLIN | (select.POLLOUT if self._unsent else 0)
        if self._closed:
            raise ConnectionLost("the connection is closed")
        poll = select.poll()
        poll.register(self._sock, events)
        poll.poll(max(0.0, deadline - time.monotonic()) * 1000)

    def flushed(self) -> bool:
        """Whether the daemon's socket has everything.

        Raises:
            ConnectionLost: the daemon is gone.
        """
        with self._send_lock:
            self._flush()
            return not self._unsent

    def close(self) -> None:
        """Closes the socket and descriptors that nobody took."""
        self._closed = True
        self._sock.close()
        while self._fds:
            os.close(self._fds.popleft())

    def _flush(self) -> None:
        try:
            while self._unsent and not self._closed:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise ConnectionLost(f"the daemon is gone ({error.strerror})") from error

    def _read(self) -> bool:
        """Reads once; False when nothing is there."""
        if self._closed:
            raise ConnectionLost("the connection is closed")
        try:
            # Not socket.recv_fds, which drops its flags (CPython 3.11).
            count, ancillary, _, _ = self._sock.recvmsg_into([self._read_into], _FDS_BYTES, _CLOSE_ON_EXEC)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConnectionLost(f"the daemon is gone ({error.strerror})") from error
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds.extend(array("i", payload[: len(payload) // _FD_BYTES * _FD_BYTES]))
        if not count:
            raise ConnectionLost("the daemon closed the connection")
        self._received += self._read_into[:count]
        return True

    def _parse(self) -> Arrival | None:
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > MAX_FRAME_BYTES:
            raise _not_a_daemon(f"a frame of {length} bytes, at most {MAX_FRAME_BYTES} are read")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        message = local_pb2.DaemonMessage()
        try:
            message.ParseFromString(bytes(self._received[_LENGTH.size : end]))
        except DecodeError as error:
            raise _not_a_daemon(str(error)) from error
        del self._received[:end]
        body = message.WhichOneof("body")
        announces = body == "arena_ready" or (body == "located" and message.located.step > 0)
        if announces and not self._fds:
            raise _not_a_daemon(f"{body} came without its descriptor")
        return Arrival(message, self._fds.popleft() if announces else None)


def _not_a_daemon(why: str) -> errors.ProtocolMismatch:
    return errors.ProtocolMismatch(
        "what answers on this socket is no ckptd daemon of this version",
        why,
        "use the same ckptd for trainer and daemon",
    )
