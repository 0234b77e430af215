"""Memory that was promised before training starts is nobody else's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from daemonkit import Daemon, Failure, Frames, Trainee, eventually

from ckptd.memory.budget import needed_bytes
from ckptd.v1 import local_pb2

IMAGE = 8 << 20
NEEDED = needed_bytes(IMAGE, 1, 3, 1, 0)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon with room for one job and a half."""
    one = Daemon("--memory-limit-bytes", str(NEEDED * 3 // 2))
    try:
        yield one
    finally:
        Frames.close_all()
        one.close()


def _reserve(trainee: Trainee) -> None:
    trainee.tell(reserve=local_pb2.Reserve(image_bytes=IMAGE))


def test_two_jobs_that_fit_alone_and_not_together(daemon: Daemon) -> None:
    """The second one is refused before it trains, and told who was promised what."""
    first, second = Trainee(daemon, "first"), Trainee(daemon, "second")
    _reserve(first)
    assert first.expect("reserved").reserved.needed_bytes == NEEDED
    _reserve(second)
    error = second.failure()
    assert error.code == Failure.ERROR_CODE_NO_SPACE
    assert f"first holds {NEEDED:,}" in error.why and "ckptd forget" in error.next
    # The same promise, asked for once more, is the same memory.
    _reserve(first)
    first.expect("reserved")


def test_a_promise_ends_with_the_trainers(daemon: Daemon) -> None:
    first, second = Trainee(daemon, "first"), Trainee(daemon, "second")
    _reserve(first)
    first.expect("reserved")
    first.leave()
    first.close()

    def granted() -> bool:
        _reserve(second)
        message = second.receive()
        while message is not None and message.WhichOneof("body") == "grants":
            message = second.receive()
        return message is not None and message.WhichOneof("body") == "reserved"

    eventually(granted, "the memory of the first job is free")
