"""The sending side: order, loss, refusal, and no work that stands in the way of other work."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from ckptd.errors import InvalidRequest
from ckptd.memory.bulk import BulkServer, Connection
from ckptd.memory.peer import Peer, Work
from ckptd.v1 import bulk_pb2

DEADLINE_S = 20.0


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.002)


@dataclass
class Receiver:
    """A server that notes the steps it gets, refuses some, and can go away and come back."""

    got: list[int] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)
    refusals: int = 0
    server: BulkServer | None = None
    address: str = "127.0.0.1:0"

    def start(self) -> Receiver:
        # The port may still be held by the accept thread that is just ending.
        end = time.monotonic() + DEADLINE_S
        while self.server is None:
            try:
                self.server = BulkServer(self.address, self._handle, 2.0, 0)
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.005)
        self.address = self.server.address
        return self

    def stop(self) -> None:
        if self.server is not None:
            self.server.close()
        self.server = None

    def _handle(self, connection: Connection, header: bulk_pb2.BulkHeader) -> None:
        if header.seal.step in self.refused:
            self.refusals += 1
            raise InvalidRequest(f"step {header.seal.step} is refused")
        self.got.append(header.seal.step)
        connection.send(bulk_pb2.BulkHeader(accepted=bulk_pb2.Accepted()))


@dataclass
class Sender:
    """A peer and its owner: keeps what the receiver may lack, and queues it again when asked."""

    peer: Peer = field(init=False)
    states: list[bool] = field(default_factory=list)
    reconnected: int = 0
    lacking: list[int] = field(default_factory=list)
    sends: int = 0
    wanted: Callable[[int], bool] = lambda step: True

    def open(self, address: str, timeout_s: float = 10.0) -> Sender:
        self.peer = Peer(
            "n1",
            address,
            timeout_s=timeout_s,
            nice=0,
            on_state=self.states.append,
            on_reconnected=self._again,
        )
        return self

    def put(self, *steps: int) -> None:
        self.lacking.extend(steps)
        self._queue(list(steps))

    def _again(self) -> None:
        self.reconnected += 1
        self._queue(sorted(self.lacking))

    def _queue(self, steps: list[int]) -> None:
        for step in steps:
            self.peer.enqueue(
                Work(lambda c, step=step: self._send(c, step), lambda step=step: self.wanted(step))
            )

    def _send(self, connection: Connection, step: int) -> None:
        self.sends += 1
        connection.request(bulk_pb2.BulkHeader(seal=bulk_pb2.Seal(step=step)))
        with contextlib.suppress(ValueError):
            self.lacking.remove(step)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver().start()
    yield receiver
    receiver.stop()


@pytest.fixture
def sender(receiver: Receiver) -> Iterator[Sender]:
    sender = Sender().open(receiver.address)
    yield sender
    sender.peer.close()
    sender.peer._thread.join(DEADLINE_S)
    assert not sender.peer._thread.is_alive()


def test_work_is_done_in_order(receiver: Receiver, sender: Sender) -> None:
    sender.put(*range(100))
    until(lambda: len(receiver.got) == 100, "100 frames")
    assert receiver.got == list(range(100))
    assert sender.states == [True] and sender.reconnected == 0 and not sender.peer.lost


def test_work_that_nobody_wants_any_more_is_skipped(receiver: Receiver, sender: Sender) -> None:
    sender.wanted = lambda step: step % 2 == 0
    sender.put(*range(10))
    until(lambda: 8 in receiver.got, "the last wanted frame")
    assert receiver.got == [0, 2, 4, 6, 8]


def test_a_receiver_that_comes_back_gets_what_it_may_lack(receiver: Receiver, sender: Sender) -> None:
    sender.put(1)
    until(lambda: receiver.got == [1], "the first frame")
    receiver.stop()
    until(lambda: sender.states == [True, False], "the loss is noticed although nothing is sent")
    assert sender.peer.lost
    sender.put(2, 3)
    receiver.start()
    until(lambda: not sender.lacking, "both frames after the return")
    until(lambda: sender.states == [True, False, True], "the return is told")
    assert sender.reconnected == 1 and not sender.peer.lost
    assert sorted(set(receiver.got)) == [1, 2, 3]


def test_a_receiver_that_is_late_gets_everything(sender: Sender, receiver: Receiver) -> None:
    """Nobody listens at first: the owner is told so, and asked again once somebody does."""
    address = receiver.address
    receiver.stop()
    other = Sender().open(address)
    try:
        until(lambda: other.states == [False], "unreachable")
        other.put(1, 2)
        receiver.start()
        until(lambda: not other.lacking, "both frames")
        assert other.states == [False, True] and other.reconnected >= 1
    finally:
        other.peer.close()


def test_a_refusal_is_no_loss(receiver: Receiver, sender: Sender) -> None:
    """A peer that is a moment behind refuses; it is well, and trainers must not hear that it is away."""
    receiver.refused.add(7)
    sender.put(7)
    until(lambda: receiver.refusals >= 2, "it is tried again")
    assert False not in sender.states and not sender.peer.lost
    receiver.refused.clear()
    until(lambda: 7 in receiver.got, "taken in the end")


def test_refused_work_does_not_stand_in_the_way_of_what_it_waits_for(
    receiver: Receiver, sender: Sender
) -> None:
    """A contribution is refused until the seal record is there, and the seal record is queued anew."""
    receiver.refused.add(5)
    sender.put(5)
    until(lambda: receiver.refusals >= 1, "refused")
    sender.put(3)
    until(lambda: 3 in receiver.got, "the other work goes through")
    receiver.refused.clear()
    until(lambda: 5 in receiver.got, "then the refused one, too")


def test_retries_do_not_pile_up(receiver: Receiver, sender: Sender) -> None:
    """However often it was tried again, what is queued stays what the peer lacks."""
    receiver.refused.add(1)
    sender.put(1, 2, 3)
    until(lambda: receiver.refusals >= 6, "six refusals")
    receiver.refused.clear()
    until(lambda: not sender.lacking, "all taken")
    before = sender.sends
    until(lambda: sender.peer._queue.empty(), "nothing is left to send")
    assert sender.sends - before <= 3
    assert receiver.got.count(2) <= 3 and receiver.got.count(3) <= 3, receiver.got


def test_a_bug_in_one_work_does_not_end_the_peer(
    receiver: Receiver, sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(connection: Connection) -> None:
        raise KeyError("ours")

    sender.peer.enqueue(Work(broken, lambda: True))
    until(lambda: "sending to" in caplog.text, "loudly")
    sender.put(4)
    until(lambda: 4 in receiver.got, "the next work is done")


def test_an_address_that_is_none_is_a_loss_and_no_storm(caplog: pytest.LogCaptureFixture) -> None:
    for address in ("", "nonsense", "127.0.0.1:none"):
        sender = Sender().open(address)
        until(lambda: sender.states == [False], "unreachable")  # noqa: B023 - waited for here
        sender.peer.close()
        sender.peer._thread.join(DEADLINE_S)
    assert "failed" not in caplog.text


def test_closing_ends_the_thread_in_the_middle_of_a_wait() -> None:
    """The receiver never answers; close does not wait for the deadline."""
    entered, go = threading.Event(), threading.Event()

    def stuck(connection: Connection, header: bulk_pb2.BulkHeader) -> None:
        entered.set()
        go.wait(5 * DEADLINE_S)

    server = BulkServer("127.0.0.1:0", stuck, 5.0, 0)
    sender = Sender().open(server.address, timeout_s=10 * DEADLINE_S)
    try:
        sender.put(1)
        assert entered.wait(DEADLINE_S)
        sender.peer.close()
        sender.peer._thread.join(DEADLINE_S)
        assert not sender.peer._thread.is_alive()
        assert sender.states == [True]  # an end of our own is no loss
    finally:
        go.set()
        server.close()
