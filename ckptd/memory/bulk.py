"""The bulk plane: framed TCP between arenas, blocking sockets, one thread per connection.

Payloads go from and into caller-owned memory; every length is checked before
anything is allocated or received.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

from google.protobuf.message import DecodeError
from xxhash import xxh3_64_digest, xxh3_128_digest

from ckptd.errors import (
    CkptdError,
    CorruptImage,
    DeadlineExceeded,
    InvalidRequest,
    ProtocolMismatch,
    Unreachable,
)
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES
from ckptd.memory.yielding import yield_to_training
from ckptd.protocol import PROTOCOL
from ckptd.v1 import bulk_pb2, common_pb2

log = logging.getLogger("ckptd.bulk")

BLOCK_CELLS = 32  # 2 MiB: large enough for full speed, small enough to yield
BLOCK_BYTES = BLOCK_CELLS * CELL_BYTES
MAX_HEADER_BYTES = 64 << 10
MAX_PAYLOAD_BYTES = 256 << 20  # the seal record of a node with 1 TiB of state; cells come in blocks
_LENGTH = struct.Struct("<I")
_HEADER_DIGEST_BYTES = 8  # TCP's own sum misses one damaged packet in 65,536
_TIMEVAL = struct.Struct("@ll")  # struct timeval of Linux
_IOV_MAX = 512  # below the kernel's 1024
_PARTING_S = 1.0  # how long a refused peer may take to read why
_CROWDED_S = 0.1  # a pause where the machine has no descriptors or threads left


class Refusal(CkptdError):
    """The peer is well, and refused what was asked; the words are its own."""


class Connection:
    """One framed TCP connection; used by one thread at a time.

    Raises (every method):
        Unreachable: the peer is gone.
        DeadlineExceeded: a frame, or its payload, did not pass in time.
    """

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        with contextlib.suppress(OSError):  # a peer that is gone already is noticed when it is read from
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # An idle connection whose peer lost its power ends, too.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(timeout_s)))
            # The kernel's own timeouts, and not Python's, which cost a poll before every call
            # and leave no way to wait for a whole block.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))
        sock.setblocking(True)
        self._bound_receiving(timeout_s)

    @classmethod
    def open(cls, address: str, timeout_s: float) -> Connection:
        """Connects to host:port."""
        host, _, port = address.rpartition(":")
        try:
            return cls(socket.create_connection((host, int(port)), timeout=timeout_s), timeout_s)
        except (OSError, ValueError, OverflowError) as error:
            raise Unreachable(f"no bulk connection to {address}", str(error)) from error

    def send(self, header: bulk_pb2.BulkHeader, payload: Sequence[memoryview] = ()) -> None:
        """Sends one frame; the payload's views are sent as they lie."""
        header.protocol = PROTOCOL
        header.payload_bytes = sum(view.nbytes for view in payload)
        text = header.SerializeToString()
        text += xxh3_64_digest(text)
        assert len(text) <= MAX_HEADER_BYTES
        end = time.monotonic() + self._timeout_s
        views = [memoryview(_LENGTH.pack(len(text)) + text), *payload]
        try:
            while views:
                sent = self._sock.sendmsg(views[:_IOV_MAX])
                while views and sent >= views[0].nbytes:
                    sent -= views.pop(0).nbytes
                if sent:
                    views[0] = views[0][sent:]
                if views and time.monotonic() > end:
                    raise TimeoutError("bytes went out too slowly")
        except OSError as error:
            raise _failure(error, "sending") from error

    def receive(self, *, idle: bool = False) -> bulk_pb2.BulkHeader | None:
        """The next frame's header, or None at an orderly end; its payload is still to be read.

        With `idle` the frame may begin at any time, and only then has to come in time.
        """
        try:
            if idle:
                self._bound_receiving(0)
            first = self._sock.recv(_LENGTH.size)
            if idle:
                self._bound_receiving(self._timeout_s)
        except OSError as error:
            raise _failure(error, "receiving") from error
        if not first:
            return None
        prefix = bytearray(_LENGTH.size)
        prefix[: len(first)] = first
        self.receive_into(memoryview(prefix)[len(first) :])
        (length,) = _LENGTH.unpack(prefix)
        if not 0 < length <= MAX_HEADER_BYTES:
            raise ProtocolMismatch(
                "not a bulk frame", f"a header of {length} bytes, at most {MAX_HEADER_BYTES}"
            )
        text = bytearray(length)
        self.receive_into(memoryview(text))
        spoken, digest = bytes(text[:-_HEADER_DIGEST_BYTES]), bytes(text[-_HEADER_DIGEST_BYTES:])
        if xxh3_64_digest(spoken) != digest:
            raise ProtocolMismatch("not a bulk frame", "its header does not match its digest")
        header = bulk_pb2.BulkHeader()
        try:
            header.ParseFromString(spoken)
        except DecodeError as error:
            raise ProtocolMismatch("not a bulk frame", str(error)) from error
        if header.protocol != PROTOCOL:
            raise ProtocolMismatch(
                f"peer {header.sender!r} speaks bulk protocol {header.protocol}",
                f"this daemon speaks {PROTOCOL}",
                "run the same release on every node",
            )
        if header.payload_bytes > MAX_PAYLOAD_BYTES:
            raise ProtocolMismatch(
                "bulk payload too long", f"{header.payload_bytes:,} > {MAX_PAYLOAD_BYTES:,} bytes"
            )
        return header

    def receive_into(self, view: memoryview) -> None:
        """Fills `view` with payload bytes."""
        # The socket's own timeout bounds silence; this bounds a peer that sends drop by drop.
        end = time.monotonic() + self._timeout_s
        try:
            while view.nbytes:
                got = self._sock.recv_into(view, view.nbytes, socket.MSG_WAITALL)
                if not got:
                    raise Unreachable("the peer ended the bulk connection in the middle of a frame")
                view = view[got:]
                if view.nbytes and time.monotonic() > end:
                    raise TimeoutError("bytes came in too slowly")
        except OSError as error:
            raise _failure(error, "receiving") from error

    def receive_text(self, count: int) -> bytes:
        """The message that a payload of `count` bytes is, see `message`; room is made as they come.

        Raises:
            InvalidRequest: `count` is more than any message has.
            CorruptImage: it changed on its way.
        """
        if count > MAX_PAYLOAD_BYTES:
            raise InvalidRequest(f"a message of {count:,} bytes", f"at most {MAX_PAYLOAD_BYTES:,}")
        text = bytearray()
        while len(text) < count:
            part = bytearray(min(count - len(text), BLOCK_BYTES))
            self.receive_into(memoryview(part))
            text += part
        digest = bytes(text[-DIGEST_BYTES:])
        del text[-DIGEST_BYTES:]
        if xxh3_128_digest(text) != digest:
            raise CorruptImage("a message changed on its way", f"{count} bytes do not match their digest")
        return bytes(text)

    def request(self, header: bulk_pb2.BulkHeader, payload: Sequence[memoryview] = ()) -> bulk_pb2.BulkHeader:
        """Sends a frame and returns the answer's header.

        Raises:
            Refusal: the peer refused, with its words.
        """
        self.send(header, payload)
        return self.answer()

    def answer(self) -> bulk_pb2.BulkHeader:
        """The next answer's header.

        Raises:
            Refusal: the peer refused, with its words.
        """
        answer = self.receive()
        if answer is None:
            raise Unreachable("the peer ended the bulk connection instead of answering")
        if answer.WhichOneof("body") == "refused":
            error = answer.refused.error
            raise Refusal(error.what, error.why, error.next)
        return answer

    def alive(self) -> bool:
        """Whether the peer still holds its end open; costs no round trip."""
        try:
            return self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def part(self) -> None:
        """Ends the connection so that what was sent last arrives.

        A close with unread bytes would be a reset, which destroys what is under way to
        the peer; so what still comes is read, for a moment, and dropped.
        """
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            end = time.monotonic() + _PARTING_S
            self._bound_receiving(_PARTING_S)
            while time.monotonic() < end and self._sock.recv(BLOCK_BYTES):
                pass
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _bound_receiving(self, seconds: float) -> None:
        """How long one receive may wait; 0: for ever."""
        with contextlib.suppress(OSError):  # the owner may close it at this very moment
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))


def _failure(error: OSError, doing: str) -> CkptdError:
    if isinstance(error, TimeoutError | BlockingIOError):  # the latter is the kernel's timeout
        return DeadlineExceeded(f"bulk peer too slow while {doing}")
    return Unreachable(f"bulk connection broke while {doing}", str(error))


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return _TIMEVAL.pack(whole, int((seconds - whole) * 1e6))


Handler = Callable[[Connection, bulk_pb2.BulkHeader], None]


class BulkServer:
    """Accepts peers and calls `handler(connection, header)` per frame, in a thread per connection."""

    def __init__(self, address: str, handler: Handler, timeout_s: float, nice: int) -> None:
        host, _, port = address.rpartition(":")
        self._listener = socket.create_server((host, int(port)), backlog=64)
        self._handler = handler
        self._timeout_s = timeout_s
        self._nice = nice
        self._lock = threading.Lock()
        self._open: set[Connection] = set()
        self._closed = False
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="bulk-accept", daemon=True).start()

    def close(self) -> None:
        """Stops accepting and ends every connection."""
        with self._lock:
            self._closed = True
            connections = list(self._open)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in connections:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                # A peer that left its place in the queue, or no descriptor is free: both pass.
                log.warning("cannot accept a bulk connection: %s", error)
                time.sleep(_CROWDED_S)
                continue
            connection = Connection(sock, self._timeout_s)
            name = f"bulk-from-{peer[0]}:{peer[1]}"
            with self._lock:
                if self._closed:
                    connection.close()
                    return
                self._open.add(connection)
            try:
                threading.Thread(target=self._serve, args=(connection,), name=name, daemon=True).start()
            except RuntimeError as error:
                log.warning("no thread for a bulk connection: %s", error)
                with self._lock:
                    self._open.discard(connection)
                connection.close()
                time.sleep(_CROWDED_S)

    def _serve(self, connection: Connection) -> None:
        yield_to_training(self._nice)
        try:
            while (header := connection.receive(idle=True)) is not None:
                self._handler(connection, header)
        except ProtocolMismatch as error:
            _refuse(connection, error)
        except (Unreachable, DeadlineExceeded) as error:
            log.debug("bulk connection ended: %s", error)
        except CkptdError as error:
            _refuse(connection, error)
        except Exception:
            log.exception("bulk connection failed")
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()


def _refuse(connection: Connection, error: CkptdError) -> None:
    log.debug("bulk connection refused: %s", error)
    with contextlib.suppress(CkptdError):
        connection.send(refusal(error))
        connection.part()


def message(text: bytes) -> list[memoryview]:
    """The payload that carries a message, with its digest; `Connection.receive_text` takes it."""
    return [memoryview(text), memoryview(xxh3_128_digest(text))]


def refusal(error: CkptdError) -> bulk_pb2.BulkHeader:
    """The answer that carries `error` to the peer."""
    wire = common_pb2.Error(what=error.what, why=error.why, next=error.next)
    return bulk_pb2.BulkHeader(refused=bulk_pb2.Refused(error=wire))
