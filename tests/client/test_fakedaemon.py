"""The fake daemon and the real one hold the same conversation with a trainer that speaks frames by hand."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakedaemon import FakeDaemon

from ckptd.client import embedded
from ckptd.client.connection import Arrival, Connection, dial
from ckptd.client.settings import Environment
from ckptd.protocol import PROTOCOL
from ckptd.v1 import common_pb2, local_pb2

IMAGE_BYTES = 3 * 65536 + 17


class Conversation:
    """A trainer of rank 0 of 1 without anything to train."""

    def __init__(self, path: Path, **hello: Any) -> None:
        self.connection = Connection(dial(path), "talk", 0)
        self.schedule = common_pb2.Schedule()
        self.grants: dict[int, int] = {}
        given = {
            "protocol": PROTOCOL,
            "world_size": 1,
            "local_world_size": 1,
            "every": 1,
            "slots": 3,
            **hello,
        }
        self.tell(hello=local_pb2.Hello(**given))

    def tell(self, **body: Any) -> None:
        self.connection.send(local_pb2.TrainerMessage(**body), 10)

    def hear(self, answer: str) -> Arrival:
        """The next message that is no push of a schedule."""
        found: list[Arrival] = []
        self.until(lambda: bool(found), found)
        assert found[0].message.WhichOneof("body") == answer, found[0].message
        return found[0]

    def until(self, condition: Callable[[], bool], others: list[Arrival] | None = None) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            arrival = self.connection.take()
            if arrival is None:
                assert time.monotonic() < deadline, (self.schedule, self.grants)
                self.connection.wait(deadline)
            elif arrival.message.WhichOneof("body") == "grants":
                self.schedule = arrival.message.grants.schedule
                self.grants = {grant.step: grant.slot for grant in arrival.message.grants.grants}
            else:
                assert others is not None, arrival
                others.append(arrival)

    def begin(self) -> local_pb2.Welcome:
        welcome = self.hear("welcome").message.welcome
        self.connection.generation = welcome.generation
        return welcome


@pytest.fixture(params=["fake", "real"])
def daemon(request: pytest.FixtureRequest, socket_path: Path) -> Iterator[Path]:
    if request.param == "real":
        request.getfixturevalue("home")
        yield embedded.find_daemon(None, Environment.read(), 30)
        return
    started = FakeDaemon(socket_path, space_bytes=1 << 34)
    yield socket_path
    started.stop()
    assert started.complaints == []


def test_a_life(daemon: Path) -> None:
    talk = Conversation(daemon)
    welcome = talk.begin()
    assert welcome.protocol == PROTOCOL and welcome.generation == 1 and welcome.node

    talk.tell(reserve=local_pb2.Reserve(image_bytes=IMAGE_BYTES))
    reserved = talk.hear("reserved").message.reserved
    assert IMAGE_BYTES * 2 <= reserved.needed_bytes <= reserved.available_bytes
    talk.tell(reserve=local_pb2.Reserve(image_bytes=1 << 44))
    assert talk.hear("failure").message.failure.error.code == common_pb2.ERROR_CODE_NO_SPACE

    talk.tell(locate=local_pb2.Locate())
    located = talk.hear("located").message.located
    assert (located.step, located.rung) == (0, "none")

    plan_hash = bytes(range(16))
    talk.tell(plan=local_pb2.Plan(plan_hash=plan_hash, image_bytes=IMAGE_BYTES))
    arrival = talk.hear("arena_ready")
    ready = arrival.message.arena_ready
    assert ready.plan_hash == plan_hash and ready.slots == 3 and ready.slot_bytes >= IMAGE_BYTES
    assert arrival.fd is not None and os.fstat(arrival.fd).st_size >= ready.slots * ready.slot_bytes
    arena = mmap.mmap(arrival.fd, ready.slots * ready.slot_bytes)
    os.close(arrival.fd)

    def capture(step: int) -> int:
        """Takes a step and waits until it is protected."""
        talk.until(lambda: step in talk.grants)
        slot = talk.grants[step]
        begin = slot * ready.slot_bytes
        arena[begin : begin + IMAGE_BYTES] = bytes([step]) * IMAGE_BYTES
        talk.tell(progress=local_pb2.Progress(step=step))
        talk.tell(captured=local_pb2.Captured(step=step, slot=slot, plan_hash=plan_hash))
        talk.until(lambda: talk.schedule.has_watermark and talk.schedule.watermark == step)
        return slot

    # Due steps lie ahead, each is granted one slot of its own, and stays due until it is protected.
    talk.until(lambda: len(talk.grants) == 2)
    assert list(talk.schedule.due) == sorted(talk.grants) == [1, 2]
    assert talk.schedule.generation == 1
    slots = [capture(step) for step in (1, 2, 3)]
    # The watermark's slot is not given away.
    talk.until(lambda: len(talk.grants) == 2)
    assert slots[-1] not in talk.grants.values()

    # A step given up is given up for good; others take its place.
    talk.tell(aborted=local_pb2.Aborted(step=4, reason="no reason"))
    talk.until(lambda: 4 in talk.schedule.aborted and 4 not in talk.schedule.due)
    talk.tell(progress=local_pb2.Progress(step=4))

    # A loss that is not finite stops everything until it is accepted.
    talk.tell(aborted=local_pb2.Aborted(step=5, reason="nan", not_finite=True))
    talk.until(lambda: talk.schedule.held and not talk.schedule.due)
    talk.tell(progress=local_pb2.Progress(step=5))
    talk.tell(accept=local_pb2.Accept())
    talk.until(lambda: not talk.schedule.held and bool(talk.grants))
    last = min(talk.grants)
    assert last > 5
    capture(last)
    arena.close()
    talk.connection.close()

    again = Conversation(daemon)
    again.begin()
    again.tell(locate=local_pb2.Locate())
    arrival = again.hear("located")
    located = arrival.message.located
    assert (located.step, located.generation, located.rung, located.verified) == (last, 1, "own-memory", True)
    assert located.image_bytes == IMAGE_BYTES and arrival.fd is not None
    image = os.pread(arrival.fd, IMAGE_BYTES, located.slot * located.slot_bytes)
    os.close(arrival.fd)
    assert image == bytes([last]) * IMAGE_BYTES
    again.tell(goodbye=local_pb2.Goodbye(park=False))
    again.connection.close()


def test_another_protocol_is_refused(daemon: Path) -> None:
    talk = Conversation(daemon, protocol=PROTOCOL + 1)
    assert talk.hear("failure").message.failure.error.code == common_pb2.ERROR_CODE_PROTOCOL
    talk.connection.close()
