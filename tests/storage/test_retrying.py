"""Retries end, wait at random, and look back where an answer was lost; time is a number here."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable

import pytest

from ckptd.errors import CkptdError, DeadlineExceeded, NotFound, Unreachable
from ckptd.storage.patient import Patient
from ckptd.storage.retrying import Failed, Policy, Retrying


class World:
    """A clock that only waits move."""

    def __init__(self, policy: Policy, seed: int = 1) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.retrying = Retrying(
            policy, clock=lambda: self.now, sleep=self._sleep, random=random.Random(seed).random
        )

    def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def fails(self, times: int, takes_s: float = 0.0) -> Callable[[float], str]:
        left = [times]

        def attempt(deadline_s: float) -> str:
            assert deadline_s > 0
            self.now += min(takes_s, deadline_s)
            if left[0]:
                left[0] -= 1
                raise Failed(CkptdError("503"), again=True)
            return "done"

        return attempt


def test_a_call_is_tried_until_it_succeeds() -> None:
    world = World(Policy(tries=5))
    assert world.retrying.call("x", world.fails(4)) == "done"
    assert len(world.pauses) == 4
    assert all(p < 0.1 * 2**i for i, p in enumerate(world.pauses))
    other = World(Policy(tries=5), seed=2)
    other.retrying.call("x", other.fails(4))
    assert not set(world.pauses) & set(other.pauses)  # who failed together does not come back together


def test_tries_deadline_and_budget_end_it() -> None:
    world = World(Policy(tries=3))
    with pytest.raises(Unreachable, match="tried 3 times"):
        world.retrying.call("x", world.fails(9))
    world = World(Policy(tries=1000, try_s=10, total_s=60))
    with pytest.raises(DeadlineExceeded, match="x: 503"):
        world.retrying.call("x", world.fails(999, takes_s=20))
    assert world.now <= 60
    world = World(Policy(tries=10, budget=12))
    for _ in range(5):
        with pytest.raises(Unreachable):
            world.retrying.call("x", world.fails(99))
    assert len(world.pauses) == 12  # and no more, however many calls there are
    for _ in range(10):
        world.retrying.call("x", world.fails(0))
    assert 0.99 < world.retrying.budget.left < 1.01


def test_bytes_get_the_time_that_they_may_take() -> None:
    world = World(Policy(tries=2, try_s=1, total_s=1.5, slowest_bytes_per_s=100))
    seen: list[float] = []

    def attempt(deadline_s: float) -> None:
        seen.append(deadline_s)

    world.retrying.call("x", attempt)
    world.retrying.call("x", attempt, nbytes=500)
    assert seen == [1, 6]


def test_no_failure_is_told_before_looking_back() -> None:
    world = World(Policy(tries=2))
    for fatal in ([False], [True, False], [True, True]):
        assert world.retrying.call("x", _ends(fatal), settle=lambda: "mine") == "mine"
    with pytest.raises(NotFound):
        world.retrying.call("x", _ends([True, False]), settle=lambda: None)
    with pytest.raises(Unreachable, match="tried 2 times"):
        world.retrying.call("x", _ends([True, True]), settle=lambda: None)


def test_another_try_that_would_end_the_same_is_not_made() -> None:
    world = World(Policy(tries=5))
    with pytest.raises(NotFound):
        world.retrying.call("x", _ends([False]))
    assert world.pauses == []


def test_a_file_system_is_asked_again_after_what_may_pass_and_no_other() -> None:
    world = World(Policy(tries=3))
    patient = Patient(world.retrying)
    errors: list[OSError] = [ConnectionResetError("reset"), TimeoutError("late")]

    def flaky() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert patient("x", flaky) == "done" and len(world.pauses) == 2
    errors[:] = [ConnectionResetError("reset")] * 9
    with pytest.raises(Unreachable, match="x: reset; tried 3 times"):
        patient("x", flaky)
    for error in (FileNotFoundError(), FileExistsError(), OSError(errno.ENOSPC, "full")):
        world.pauses.clear()
        errors[:] = [error]
        with pytest.raises(type(error)):
            patient("x", flaky)
        assert world.pauses == []


def test_a_file_system_that_does_not_answer_is_left() -> None:
    released = threading.Event()
    patient = Patient(World(Policy(tries=2, try_s=0.02)).retrying)
    with pytest.raises(Unreachable, match=r"no answer in 0\.0 s; tried 2 times"):
        patient("x", lambda: released.wait(60))
    with pytest.raises(TimeoutError):
        patient.once(lambda: released.wait(60))
    released.set()


def _ends(again: list[bool]) -> Callable[[float], str]:
    """Tries that fail one after the other; after each, another one may be worth it, or not."""
    rest = list(again)

    def attempt(_: float) -> str:
        raise Failed(NotFound("gone"), again=rest.pop(0))

    return attempt
