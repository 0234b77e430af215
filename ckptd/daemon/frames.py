"""The UNIX socket's frames, daemon side: ordered sends, descriptors, bounded lengths."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque

from google.protobuf.message import DecodeError

from ckptd.errors import CkptdError, ProtocolMismatch
from ckptd.v1 import common_pb2, local_pb2

MAX_FRAME_BYTES = 16 << 20
_DRAIN_S = 0.05
_FLUSH_S = 1.0
_MAX_WAITING = 64  # frames
_LENGTH = struct.Struct("<I")
_CODES = {
    "InvalidRequest": common_pb2.ERROR_CODE_INVALID,
    "ProtocolMismatch": common_pb2.ERROR_CODE_PROTOCOL,
    "StaleGeneration": common_pb2.ERROR_CODE_STALE_GENERATION,
    "RankTaken": common_pb2.ERROR_CODE_RANK_TAKEN,
    "NoSpace": common_pb2.ERROR_CODE_NO_SPACE,
    "NotFound": common_pb2.ERROR_CODE_NOT_FOUND,
    "DeadlineExceeded": common_pb2.ERROR_CODE_TIMEOUT,
    "CorruptImage": common_pb2.ERROR_CODE_CORRUPT,
    "NotEnoughCells": common_pb2.ERROR_CODE_UNRECOVERABLE,
}


def wire_error(error: CkptdError) -> common_pb2.Error:
    """`error` as it travels."""
    code = _CODES.get(type(error).__name__, common_pb2.ERROR_CODE_UNSPECIFIED)
    return common_pb2.Error(code=code, what=error.what, why=error.why, next=error.next)


def failure(error: CkptdError) -> local_pb2.DaemonMessage:
    """The frame that carries an error to a trainer."""
    return local_pb2.DaemonMessage(failure=local_pb2.Failure(error=wire_error(error)))


class FrameLink:
    """One trainer's connection; frames leave in the order of `send`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._outbox: deque[tuple[local_pb2.DaemonMessage, int | None]] = deque()
        self._wake = asyncio.Event()
        self._progress = asyncio.Event()  # replaced whenever a frame was sent
        self._writer = asyncio.create_task(self._write())
        self._ended = asyncio.Event()
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self.pid: int = pid
        self.uid: int = uid

    def send(self, message: local_pb2.DaemonMessage, fd: int | None = None) -> None:
        """Queues a frame; of several waiting Grants only the newest is sent."""
        if message.WhichOneof("body") == "grants":
            self._outbox = deque(item for item in self._outbox if item[0].WhichOneof("body") != "grants")
        self._outbox.append((message, fd))
        self._wake.set()

    async def receive(self) -> local_pb2.TrainerMessage | None:
        """The next message, or None when the trainer is gone.

        Raises:
            ProtocolMismatch: the bytes are no frame of ours.
        """
        prefix = await self._exactly(_LENGTH.size)
        if prefix is None:
            return None
        (length,) = _LENGTH.unpack(prefix)
        if length > MAX_FRAME_BYTES:
            raise ProtocolMismatch(
                "not a ckptd trainer", f"a frame of {length} bytes, at most {MAX_FRAME_BYTES}"
            )
        text = await self._exactly(length)
        if text is None:
            return None
        message = local_pb2.TrainerMessage()
        try:
            message.ParseFromString(text)
        except DecodeError as error:
            raise ProtocolMismatch("not a ckptd trainer", str(error)) from error
        return message

    async def flush(self) -> None:
        """Returns when everything queued has been sent, or the trainer is gone or does not read."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await self._sent_down_to(0)

    async def room(self) -> None:
        """Returns when the queue is short: a trainer that asks and does not read waits for itself."""
        await self._sent_down_to(_MAX_WAITING)

    async def _sent_down_to(self, count: int) -> None:
        while len(self._outbox) > count and not self._writer.done():
            await self._progress.wait()

    async def drained(self) -> None:
        """Returns when what a dead trainer sent has been served, or soon after.

        Its forked workers may hold the connection open for a while, so the end of the
        stream is not waited for without a bound.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                await self._ended.wait()

    def close(self) -> None:
        self._ended.set()
        self._writer.cancel()
        self._sock.close()

    async def _exactly(self, count: int) -> bytes | None:
        loop = asyncio.get_running_loop()
        data = bytearray()
        while len(data) < count:
            try:
                part = await loop.sock_recv(self._sock, min(count - len(data), 1 << 18))
            except OSError:
                return None
            if not part:
                return None
            data += part
        return bytes(data)

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while self._outbox:
                message, fd = self._outbox[0]
                text = message.SerializeToString()
                data = memoryview(_LENGTH.pack(len(text)) + text)
                try:
                    if fd is not None:
                        data = data[await self._send_with(data, fd) :]
                    await loop.sock_sendall(self._sock, data)
                except OSError:
                    asyncio.get_running_loop().call_soon(self._progressed)
                    return  # the reader sees the end, too
                if self._outbox and self._outbox[0][0] is message:
                    self._outbox.popleft()
                self._progressed()
            self._wake.clear()
            if not self._outbox:
                await self._wake.wait()

    def _progressed(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    async def _send_with(self, data: memoryview, fd: int) -> int:
        loop = asyncio.get_running_loop()
        while True:
            try:
                return socket.send_fds(self._sock, [data], [fd])
            except BlockingIOError:
                writable = loop.create_future()
                loop.add_writer(self._sock.fileno(), writable.set_result, None)
                try:
                    await writable
                finally:
                    loop.remove_writer(self._sock.fileno())
