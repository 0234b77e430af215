"""Retries end, wait at random, and look back where an answer was lost; time is a number here."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from ckptd.errors import CkptdError, DeadlineExceeded, NotFound, Unreachable
from ckptd.storage.retrying import Failed, Policy, Retrying, Verdict


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

    def fails(self, verdict: Verdict, times: int, takes_s: float = 0.0) -> Callable[[float], str]:
        left = [times]

        def attempt(deadline_s: float) -> str:
            assert deadline_s > 0
            self.now += min(takes_s, deadline_s)
            if left[0]:
                left[0] -= 1
                raise Failed(verdict, CkptdError("503"))
            return "done"

        return attempt


def test_a_call_is_tried_until_it_succeeds() -> None:
    world = World(Policy(tries=5))
    assert world.retrying.call("x", world.fails(Verdict.AGAIN, 4)) == "done"
    assert len(world.pauses) == 4
    assert all(p <= 0.1 * 2**i for i, p in enumerate(world.pauses))
    assert len(set(world.pauses)) == 4  # jitter


def test_tries_deadline_and_budget_end_it() -> None:
    world = World(Policy(tries=3))
    with pytest.raises(Unreachable, match="tried 3 times"):
        world.retrying.call("x", world.fails(Verdict.AGAIN, 9))
    world = World(Policy(tries=1000, try_s=10, total_s=60))
    with pytest.raises(DeadlineExceeded, match="x: 503"):
        world.retrying.call("x", world.fails(Verdict.UNSURE, 999, takes_s=20))
    assert world.now <= 60
    world = World(Policy(tries=10, budget=12))
    for _ in range(5):
        with pytest.raises(Unreachable):
            world.retrying.call("x", world.fails(Verdict.AGAIN, 99))
    assert len(world.pauses) == 12  # and no more, however many calls there are
    for _ in range(10):
        world.retrying.call("x", world.fails(Verdict.AGAIN, 0))
    assert 0.99 < world.retrying.budget.left < 1.01


def test_bytes_get_the_time_that_they_may_take() -> None:
    world = World(Policy(tries=2, try_s=1, total_s=1.5, slowest_bytes_per_s=100))
    seen: list[float] = []

    def attempt(deadline_s: float) -> None:
        seen.append(deadline_s)

    world.retrying.call("x", attempt)
    world.retrying.call("x", attempt, nbytes=500)
    assert seen == [1, 6]


def test_only_an_unsure_end_is_looked_back_at() -> None:
    looked: list[int] = []

    def settle() -> str:
        looked.append(1)
        return "mine"

    world = World(Policy(tries=2))
    with pytest.raises(NotFound):
        world.retrying.call("x", _then(world, [Verdict.AGAIN, Verdict.FATAL]), settle=settle)
    assert looked == []  # no try of ours can have done it
    assert world.retrying.call("x", _then(world, [Verdict.UNSURE, Verdict.FATAL]), settle=settle) == "mine"
    assert world.retrying.call("x", _then(world, [Verdict.UNSURE, Verdict.AGAIN]), settle=settle) == "mine"
    with pytest.raises(NotFound):
        world.retrying.call("x", _then(world, [Verdict.UNSURE, Verdict.FATAL]), settle=lambda: None)


def _then(world: World, verdicts: list[Verdict]) -> Callable[[float], str]:
    rest = list(verdicts)

    def attempt(_: float) -> str:
        raise Failed(rest.pop(0), NotFound("gone"))

    return attempt
