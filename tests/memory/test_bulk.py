"""The bulk plane against peers that lie, stutter, stop or speak something else."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_digest

from ckptd.errors import (
    CkptdError,
    CorruptImage,
    DeadlineExceeded,
    InvalidRequest,
    ProtocolMismatch,
    Unreachable,
)
from ckptd.image.digest import CELL_BYTES
from ckptd.memory import bulk
from ckptd.memory.bulk import BulkServer, Connection, Refusal
from ckptd.v1 import bulk_pb2

TIMEOUT_S = 5.0
SHORT_S = 0.15


def _echo(connection: Connection, header: bulk_pb2.BulkHeader) -> None:
    """Answers a frame with its own payload; refuses one with a Seal of step 13 before reading it."""
    if header.seal.step == 13:
        raise InvalidRequest("thirteen", "it is refused", "take another")
    payload = memoryview(bytearray(header.payload_bytes))
    connection.receive_into(payload)
    connection.send(bulk_pb2.BulkHeader(cells=bulk_pb2.Cells()), [payload])


def _server(timeout_s: float = TIMEOUT_S, handler: Callable[..., None] = _echo) -> BulkServer:
    return BulkServer("127.0.0.1:0", handler, timeout_s, 0)


@pytest.fixture
def server() -> Iterator[BulkServer]:
    server = _server()
    yield server
    server.close()


@pytest.fixture
def impatient() -> Iterator[BulkServer]:
    """A server that waits 0.15 s."""
    server = _server(SHORT_S)
    yield server
    server.close()


def _dial(server: BulkServer) -> socket.socket:
    host, _, port = server.address.rpartition(":")
    sock = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
    sock.settimeout(TIMEOUT_S)
    return sock


def _frame(header: bulk_pb2.BulkHeader) -> bytes:
    text = header.SerializeToString()
    text += xxh3_64_digest(text)
    return struct.pack("<I", len(text)) + text


def _header(payload_bytes: int = 0, protocol: int = 1) -> bulk_pb2.BulkHeader:
    return bulk_pb2.BulkHeader(
        protocol=protocol, sender="n9", payload_bytes=payload_bytes, seal=bulk_pb2.Seal(step=1)
    )


def _say(sock: socket.socket, data: bytes) -> None:
    """Sends all and nothing more; the server may have had enough before."""
    with contextlib.suppress(OSError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


def _drained(sock: socket.socket) -> bytes:
    """Everything that still comes, until the other side ends the connection."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(1 << 16):
            data += part
    return data


def _serves(server: BulkServer, nbytes: int = 2 * CELL_BYTES + 5) -> None:
    """A well-behaved peer is still served, and gets its own bytes back."""
    connection = Connection.open(server.address, TIMEOUT_S)
    try:
        payload = os.urandom(nbytes)
        views = [memoryview(payload)[:7], memoryview(b""), memoryview(payload)[7:]]
        answer = connection.request(_header(), views)
        assert answer.payload_bytes == nbytes
        back = memoryview(bytearray(nbytes))
        connection.receive_into(back)
        assert bytes(back) == payload
    finally:
        connection.close()


# Frames that are none


@pytest.mark.parametrize(
    ("what", "garbage"),
    [
        ("a header of no bytes", struct.pack("<I", 0)),
        ("a header longer than the bound", struct.pack("<I", (64 << 10) + 1)),
        ("a header of 4 GiB", b"\xff\xff\xff\xff"),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: n0\r\n\r\n"),
        ("TLS", bytes.fromhex("1603010200010001fc0303") + bytes(64)),
        ("no protobuf", struct.pack("<I", 8) + b"\xff" * 8),
        ("a group that never ends", struct.pack("<I", 2) + b"\x0b\x0b"),
        ("no protocol", _frame(bulk_pb2.BulkHeader(sender="n9"))),
        ("another protocol", _frame(_header(protocol=2))),
        ("a payload longer than the bound", _frame(_header(payload_bytes=bulk.MAX_PAYLOAD_BYTES + 1))),
        ("a payload of 2^64 - 1 bytes", _frame(_header(payload_bytes=2**64 - 1))),
    ],
)
def test_a_malformed_frame_ends_that_connection_and_no_other(
    server: BulkServer, what: str, garbage: bytes
) -> None:
    neighbour = Connection.open(server.address, TIMEOUT_S)
    with _dial(server) as sock:
        _say(sock, garbage)
        answer = _drained(sock)
    # Whoever speaks our frames is told why.
    (length,) = struct.unpack("<I", answer[:4])
    refused = bulk_pb2.BulkHeader.FromString(answer[4 : 4 + length - 8])
    assert refused.refused.error.what, what
    neighbour.send(_header())
    assert neighbour.answer().WhichOneof("body") == "cells"
    neighbour.close()
    _serves(server)


@settings(deadline=None, max_examples=30)
@given(garbage=st.binary(min_size=4, max_size=200))
def test_random_bytes_do_no_harm(garbage: bytes) -> None:
    """Whatever comes: the connection ends or waits for more, and the server serves on."""
    server = _FUZZED.server()
    with _dial(server) as sock:
        _say(sock, garbage)
        _drained(sock)
    _serves(server, 100)


class _Fuzzed:
    """One server for all of hypothesis's examples."""

    def __init__(self) -> None:
        self._server: BulkServer | None = None

    def server(self) -> BulkServer:
        if self._server is None:
            self._server = _server(0.5)
        return self._server

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


_FUZZED = _Fuzzed()


@pytest.fixture(scope="module", autouse=True)
def _end_of_fuzzing() -> Iterator[None]:
    yield
    _FUZZED.close()


@pytest.mark.parametrize("cut", [1, 3, 4, 9, -1])
def test_half_a_frame_and_a_close_end_quietly(server: BulkServer, cut: int) -> None:
    frame = _frame(_header(payload_bytes=100)) + bytes(100)
    with _dial(server) as sock:
        sock.sendall(frame[:cut])
    _serves(server)


# Lengths that lie


def test_a_lying_length_costs_no_memory() -> None:
    """A message of 200 MiB is announced and 10 bytes come: no room is made for the rest."""
    failed: list[CkptdError] = []
    grown: list[int] = []

    def handler(connection: Connection, header: bulk_pb2.BulkHeader) -> None:
        before = _address_space()
        try:
            connection.receive_text(header.payload_bytes)
        except CkptdError as error:
            failed.append(error)
            raise
        finally:
            grown.append(_address_space() - before)

    server = _server(SHORT_S, handler)
    try:
        with _dial(server) as sock:
            sock.sendall(_frame(_header(payload_bytes=200 << 20)) + bytes(10))
            _drained(sock)
        assert isinstance(failed[0], DeadlineExceeded)
        assert grown[0] < 100 << 20, f"{grown[0]:,} bytes"
    finally:
        server.close()


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def test_a_message_longer_than_any_is_refused_before_it_is_read() -> None:
    ours, _theirs = socket.socketpair()
    connection = Connection(ours, TIMEOUT_S)
    with pytest.raises(InvalidRequest, match="at most"):
        connection.receive_text(bulk.MAX_PAYLOAD_BYTES + 1)
    connection.close()
    _theirs.close()


def test_a_message_arrives_whole(server: BulkServer) -> None:
    connection = Connection.open(server.address, TIMEOUT_S)
    text = os.urandom(3 * bulk.BLOCK_BYTES + 11)
    answer = connection.request(_header(), bulk.message(text))
    assert connection.receive_text(answer.payload_bytes) == text
    with pytest.raises(CorruptImage, match="0 bytes"):  # not even a digest
        connection.receive_text(0)
    connection.close()


def test_a_message_that_changed_on_its_way_is_refused(server: BulkServer) -> None:
    for at in (0, 5, 99, 100, 115):  # the echo sends back what it got
        connection = Connection.open(server.address, TIMEOUT_S)
        views = [memoryview(bytearray(view)) for view in bulk.message(os.urandom(100))]
        views[at // 100][at % 100] ^= 0x10
        answer = connection.request(_header(), views)
        with pytest.raises(CorruptImage, match="changed on its way"):
            connection.receive_text(answer.payload_bytes)
        connection.close()


def test_every_bit_of_a_header_counts(server: BulkServer) -> None:
    """A frame with any one bit of its header flipped is never handled."""
    frame = _frame(_header())
    for bit in range(8 * struct.calcsize("<I"), 8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        with _dial(server) as sock:
            _say(sock, bytes(flipped))
            answer = bulk_pb2.BulkHeader.FromString(_drained(sock)[4:-8])
            assert "does not match its digest" in answer.refused.error.why, f"bit {bit}"
    _serves(server, 100)


def test_many_views_go_in_one_frame(server: BulkServer) -> None:
    """More than the kernel takes in one sendmsg."""
    connection = Connection.open(server.address, TIMEOUT_S)
    content = os.urandom(3000)
    views = [memoryview(content)[i : i + 1] for i in range(len(content))] + bulk.message(content)[1:]
    answer = connection.request(_header(), views)
    assert connection.receive_text(answer.payload_bytes) == content
    connection.close()


# Peers that are slow


@pytest.mark.parametrize(
    "sent", [b"\x08", struct.pack("<I", 50) + b"x", _frame(_header(payload_bytes=9)) + b"x"]
)
def test_a_peer_that_stops_in_a_frame_meets_the_deadline(impatient: BulkServer, sent: bytes) -> None:
    with _dial(impatient) as sock:
        sock.sendall(sent)
        _drained(sock)  # else the server waits for the rest for longer than this end does
    _serves(impatient, 100)


def test_a_peer_that_drips_meets_the_deadline_too(impatient: BulkServer) -> None:
    """Each byte comes in time, and the frame would still take for ever."""
    with _dial(impatient) as sock:
        sock.sendall(_frame(_header(payload_bytes=1 << 20)))
        sock.settimeout(SHORT_S / 5)
        deadline = time.monotonic() + 4 * TIMEOUT_S
        ended = False
        while not ended and time.monotonic() < deadline:
            try:
                sock.send(b"x")
                ended = sock.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                ended = True
        assert ended, "the server still waits for the rest"


def test_an_idle_connection_is_kept(impatient: BulkServer) -> None:
    """Between frames there is no deadline: a group may have nothing to say for hours."""
    connection = Connection.open(impatient.address, TIMEOUT_S)
    deadline = time.monotonic() + 3 * SHORT_S
    while time.monotonic() < deadline:
        assert connection.alive()
        time.sleep(SHORT_S / 4)
    connection.send(_header())
    assert connection.answer().WhichOneof("body") == "cells"
    connection.close()


def test_a_server_that_does_not_answer_is_a_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = Connection.open(f"127.0.0.1:{listener.getsockname()[1]}", SHORT_S)
        with pytest.raises(DeadlineExceeded):
            connection.request(_header())
        connection.close()


def test_a_server_that_does_not_read_is_a_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = Connection.open(f"127.0.0.1:{listener.getsockname()[1]}", SHORT_S)
        with pytest.raises(DeadlineExceeded):
            connection.send(_header(), [memoryview(bytes(64 << 20))])
        connection.close()


# Ends


def test_nobody_there_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    for wrong in (address, "127.0.0.1:", "", "127.0.0.1:http", "127.0.0.1:99999", "no.such.host.invalid:1"):
        with pytest.raises(Unreachable):
            Connection.open(wrong, TIMEOUT_S)


def test_a_refusal_is_read_although_its_cause_was_not(
    server: BulkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server refuses before it reads the payload; the words arrive all the same."""
    monkeypatch.setattr(bulk, "_PARTING_S", 4 * TIMEOUT_S)  # both ends are held up together here
    for _ in range(5):
        connection = Connection.open(server.address, TIMEOUT_S)
        header = _header()
        header.seal.step = 13
        with pytest.raises(Refusal) as caught:
            connection.request(header, [memoryview(bytes(1 << 20))])
        assert (caught.value.what, caught.value.why, caught.value.next) == (
            "thirteen",
            "it is refused",
            "take another",
        )
        connection.close()
    _serves(server)


def test_an_answer_of_another_protocol_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            sock, _ = listener.accept()
            sock.recv(1 << 16)
            sock.sendall(_frame(bulk_pb2.BulkHeader(protocol=7, accepted=bulk_pb2.Accepted())))
            sock.recv(1)
            sock.close()

        thread = threading.Thread(target=answer)
        thread.start()
        connection = Connection.open(f"127.0.0.1:{listener.getsockname()[1]}", TIMEOUT_S)
        with pytest.raises(ProtocolMismatch, match="speaks bulk protocol 7"):
            connection.request(_header())
        connection.close()
        thread.join(TIMEOUT_S)


def test_the_end_of_a_peer_is_seen_without_asking_it(server: BulkServer) -> None:
    connection = Connection.open(server.address, TIMEOUT_S)
    assert connection.alive()
    server.close()
    deadline = time.monotonic() + TIMEOUT_S
    while connection.alive():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    connection.close()
    assert not connection.alive()  # after a close, too


def test_closing_ends_every_connection_and_thread() -> None:
    others = set(threading.enumerate())
    server = _server()
    mine = [Connection.open(server.address, TIMEOUT_S) for _ in range(3)]
    for connection in mine:
        connection.send(_header())
        connection.answer()
    server.close()
    for connection in mine:
        with pytest.raises(Unreachable):
            connection.request(_header())
        connection.close()
    with pytest.raises(Unreachable):
        Connection.open(server.address, TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while any(t not in others for t in threading.enumerate()):
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.005)


def test_a_handler_of_ours_that_fails_ends_one_connection(caplog: pytest.LogCaptureFixture) -> None:
    def broken(connection: Connection, header: bulk_pb2.BulkHeader) -> None:
        if header.payload_bytes:
            raise KeyError("ours")
        connection.send(bulk_pb2.BulkHeader(accepted=bulk_pb2.Accepted()))

    server = _server(handler=broken)
    try:
        connection = Connection.open(server.address, TIMEOUT_S)
        with pytest.raises(Unreachable):
            connection.request(_header(), [memoryview(b"x")])
        connection.close()
        assert "bulk connection failed" in caplog.text  # loudly: it is our bug
        connection = Connection.open(server.address, TIMEOUT_S)
        assert connection.request(_header()).WhichOneof("body") == "accepted"
        connection.close()
    finally:
        server.close()


def test_a_machine_without_descriptors_serves_again_when_it_has_some(server: BulkServer) -> None:
    """EMFILE at accept passes; a server that gave up there would be gone for good."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = _dial(server)
    client.close()
    waiting = socket.socket()
    waiting.settimeout(TIMEOUT_S)
    host, _, port = server.address.rpartition(":")
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        hoard = []
        with contextlib.suppress(OSError):
            while True:
                hoard.append(os.dup(0))
        waiting.connect((host, int(port)))  # the kernel takes it; accept has no descriptor for it
        time.sleep(0.05)
    finally:
        for fd in hoard:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    waiting.sendall(_frame(_header()))
    assert waiting.recv(4)
    waiting.close()
    _serves(server)
