"""The bulk plane: framed TCP between arenas, blocking sockets, one thread per connection.

Payloads go from and into caller-owned memory; every length is checked before
anything is allocated or received.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence

from google.protobuf.message import DecodeError

from ckptd.errors import CkptdError, DeadlineExceeded, ProtocolMismatch, Unreachable
from ckptd.image.digest import CELL_BYTES
from ckptd.v1 import bulk_pb2, common_pb2

log = logging.getLogger("ckptd.bulk")

PROTOCOL = 1
BLOCK_CELLS = 16  # 1 MiB: large enough for full speed, small enough to yield
BLOCK_BYTES = BLOCK_CELLS * CELL_BYTES
MAX_HEADER_BYTES = 64 << 10
MAX_PAYLOAD_BYTES = 1 << 30  # a seal record of 64 TiB of state; cells come in blocks
_LENGTH = struct.Struct("<I")
_IOV_MAX = 512  # below the kernel's 1024


class Connection:
    """One framed TCP connection; used by one thread at a time.

    Raises (every method):
        Unreachable: the peer is gone.
        DeadlineExceeded: it did not answer in time.
    """

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(timeout_s)

    @classmethod
    def open(cls, address: str, timeout_s: float) -> Connection:
        """Connects to host:port."""
        host, _, port = address.rpartition(":")
        try:
            return cls(socket.create_connection((host, int(port)), timeout=timeout_s), timeout_s)
        except OSError as error:
            raise Unreachable(f"no bulk connection to {address}", str(error)) from error

    def send(self, header: bulk_pb2.BulkHeader, payload: Sequence[memoryview] = ()) -> None:
        """Sends one frame; the payload's views are sent as they lie."""
        header.protocol = PROTOCOL
        header.payload_bytes = sum(view.nbytes for view in payload)
        text = header.SerializeToString()
        assert len(text) <= MAX_HEADER_BYTES
        with self._errors("sending"):
            views = [memoryview(_LENGTH.pack(len(text)) + text), *payload]
            while views:
                sent = self._sock.sendmsg(views[:_IOV_MAX])
                while views and sent >= views[0].nbytes:
                    sent -= views.pop(0).nbytes
                if sent:
                    views[0] = views[0][sent:]

    def receive(self, *, idle: bool = False) -> bulk_pb2.BulkHeader | None:
        """The next frame's header, or None at an orderly end; its payload is still to be read.

        With `idle` the frame may begin at any time, and only then has to come in time.
        """
        with self._errors("receiving"):
            self._sock.settimeout(None if idle else self._timeout_s)
            first = self._sock.recv(_LENGTH.size)
            self._sock.settimeout(self._timeout_s)
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
        header = bulk_pb2.BulkHeader()
        try:
            header.ParseFromString(bytes(text))
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
        with self._errors("receiving"):
            while view.nbytes:
                got = self._sock.recv_into(view)
                if not got:
                    raise Unreachable("the peer ended the bulk connection in the middle of a frame")
                view = view[got:]

    def request(self, header: bulk_pb2.BulkHeader, payload: Sequence[memoryview] = ()) -> bulk_pb2.BulkHeader:
        """Sends a frame and returns the answer's header.

        Raises:
            CkptdError: the peer refused, with its words.
        """
        self.send(header, payload)
        return self.answer()

    def answer(self) -> bulk_pb2.BulkHeader:
        """The next answer's header."""
        answer = self.receive()
        if answer is None:
            raise Unreachable("the peer ended the bulk connection instead of answering")
        if answer.WhichOneof("body") == "refused":
            error = answer.refused.error
            raise CkptdError(error.what, error.why, error.next)
        return answer

    def alive(self) -> bool:
        """Whether the peer still holds its end open; costs no round trip."""
        try:
            self._sock.settimeout(0)
            return self._sock.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            self._sock.settimeout(self._timeout_s)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    @contextlib.contextmanager
    def _errors(self, doing: str):  # type: ignore[no-untyped-def]
        try:
            yield
        except TimeoutError as error:
            raise DeadlineExceeded(f"bulk peer too slow while {doing}") from error
        except OSError as error:
            raise Unreachable(f"bulk connection broke while {doing}", str(error)) from error


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
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                log.exception("cannot accept a bulk connection")
                return
            name = f"bulk-from-{peer[0]}:{peer[1]}"
            connection = Connection(sock, self._timeout_s)
            threading.Thread(target=self._serve, args=(connection,), name=name, daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        yield_to_training(self._nice)
        with self._lock:
            self._open.add(connection)
        try:
            while (header := connection.receive(idle=True)) is not None:
                self._handler(connection, header)
        except (Unreachable, DeadlineExceeded) as error:
            log.debug("bulk connection ended: %s", error)
        except CkptdError as error:
            with contextlib.suppress(CkptdError):
                connection.send(refusal(error))
        except Exception:
            log.exception("bulk connection failed")
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()


def refusal(error: CkptdError) -> bulk_pb2.BulkHeader:
    """The answer that carries `error` to the peer."""
    wire = common_pb2.Error(what=error.what, why=error.why, next=error.next)
    return bulk_pb2.BulkHeader(refused=bulk_pb2.Refused(error=wire))


def yield_to_training(nice: int) -> None:
    """Lowers the calling thread's priority: on Linux niceness belongs to the thread."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
