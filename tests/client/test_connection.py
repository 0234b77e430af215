"""Frames: bounded, in order, with their descriptors, and never in the way of training."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd import errors
from ckptd.client.connection import MAX_FRAME_BYTES, Connection, ConnectionLost, dial
from ckptd.v1 import local_pb2

LENGTH = struct.Struct("<I")


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    connection = Connection(ours, "job", 3)
    yield connection, theirs
    connection.close()
    theirs.close()


def frame(**body: object) -> bytes:
    text = local_pb2.DaemonMessage(**body).SerializeToString()
    return LENGTH.pack(len(text)) + text


def test_a_frame_in_pieces_is_one_message(pair: tuple[Connection, socket.socket]) -> None:
    connection, daemon = pair
    data = frame(welcome=local_pb2.Welcome(node="n1")) + frame(reserved=local_pb2.Reserved(needed_bytes=7))
    for byte in data[:-1]:
        daemon.send(bytes([byte]))
    first = connection.take()
    assert first is not None and first.message.welcome.node == "n1"
    assert connection.take() is None
    daemon.send(data[-1:])
    second = connection.take()
    assert second is not None and second.message.reserved.needed_bytes == 7


def test_descriptors_come_with_the_frames_that_announce_them(pair: tuple[Connection, socket.socket]) -> None:
    connection, daemon = pair
    files = [os.memfd_create(name) for name in ("one", "two")]
    for number, fd in enumerate(files):
        os.write(fd, b"%d" % number)
        socket.send_fds(daemon, [frame(arena_ready=local_pb2.ArenaReady(slots=number))], [fd])
        daemon.send(frame(grants=local_pb2.Grants()))
    daemon.send(frame(located=local_pb2.Located(step=0)))
    found = [connection.take() for _ in range(5)]
    for number in range(2):
        arrival = found[2 * number]
        assert arrival is not None and arrival.message.arena_ready.slots == number
        assert arrival.fd is not None and os.pread(arrival.fd, 9, 0) == b"%d" % number
        assert not os.get_inheritable(arrival.fd)
        os.close(arrival.fd)
        os.close(files[number])
    assert found[4] is not None and found[4].fd is None


@pytest.mark.parametrize(
    "data",
    [
        LENGTH.pack(MAX_FRAME_BYTES + 1),
        LENGTH.pack(3) + b"\xff\xff\xff",
        frame(arena_ready=local_pb2.ArenaReady()),
    ],
    ids=["too long", "no message", "no descriptor"],
)
def test_what_is_no_frame_of_ours_is_refused(data: bytes, pair: tuple[Connection, socket.socket]) -> None:
    connection, daemon = pair
    daemon.send(data)
    with pytest.raises(errors.ProtocolMismatch):
        connection.take()


def test_what_was_sent_before_the_end_is_read(pair: tuple[Connection, socket.socket]) -> None:
    connection, daemon = pair
    daemon.send(frame(failure=local_pb2.Failure()))
    daemon.close()
    last = connection.take()
    assert last is not None and last.message.HasField("failure")
    with pytest.raises(ConnectionLost):
        connection.take()
    with pytest.raises(ConnectionLost):
        connection.send(local_pb2.TrainerMessage(accept=local_pb2.Accept()), 1)


def test_every_frame_carries_job_generation_and_deadline(pair: tuple[Connection, socket.socket]) -> None:
    connection, daemon = pair
    connection.send(local_pb2.TrainerMessage(progress=local_pb2.Progress(step=4)), 1.5)
    data = daemon.recv(4096)
    message = local_pb2.TrainerMessage.FromString(data[LENGTH.size :])
    assert LENGTH.unpack(data[: LENGTH.size]) == (len(data) - LENGTH.size,)
    assert (message.header.job, message.header.generation, message.header.timeout_ms) == ("job", 3, 1500)


def test_a_daemon_that_does_not_read_blocks_nobody_and_is_given_up(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, _ = pair
    with pytest.raises(ConnectionLost, match="does not read"):
        for step in range(1_000_000):
            connection.send(local_pb2.TrainerMessage(progress=local_pb2.Progress(step=step)), 1)
    assert step > 10_000
    assert not connection.flushed()


def test_waiting_ends_at_the_deadline(pair: tuple[Connection, socket.socket]) -> None:
    connection, _ = pair
    began = time.monotonic()
    connection.wait(began + 0.05)
    assert time.monotonic() - began >= 0.04


def test_dialing_nobody_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        dial(tmp_path / "nobody")
