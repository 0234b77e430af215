"""What is due and how far protection has come: rules, and a simulation of ranks behind slow messages."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.memory import schedule
from ckptd.memory.schedule import MAX_ABORTED, NodeFacts, Schedule, facts_of, next_schedule
from ckptd.v1 import common_pb2, coordinator_pb2

MEMBERS = ("a", "b")


def node(name: str, step: int = 0, **facts: object) -> NodeFacts:
    defaults: dict[str, object] = {"completed": {0: step}, "ready": True}
    return NodeFacts(name, 1, **{**defaults, **facts})  # type: ignore[arg-type]


def compute(
    previous: Schedule | None, *facts: NodeFacts, every: int = 1, slots: int = 3, start_step: int = 0
) -> Schedule:
    return next_schedule(
        previous, generation=1, start_step=start_step, members=MEMBERS, facts=facts, every=every, slots=slots
    )


def test_first_due_steps_follow_the_newest_completed_one() -> None:
    assert compute(None, node("a", 4), node("b", 5)).due == (6, 7)


def test_due_steps_are_multiples_of_every() -> None:
    assert compute(None, node("a", 4), node("b", 5), every=5).due == (10, 15)


def test_nothing_is_due_until_every_rank_is_ready() -> None:
    assert compute(None, node("a"), node("b", ready=False)).due == ()


def test_the_watermark_is_the_newest_step_folded_everywhere() -> None:
    found = compute(None, node("a", 5, folded=frozenset({3, 4, 5})), node("b", 5, folded=frozenset({3, 4})))
    assert found.watermark == 4
    assert found.due == (6, 7)


def test_the_watermark_that_a_node_knows_counts() -> None:
    """A node that lags still reports old steps; another one has released them."""
    found = compute(
        None, node("a", 9, folded=frozenset({9}), watermark=8), node("b", 9, folded=frozenset({7}))
    )
    assert found.watermark == 8


def test_the_watermark_never_falls() -> None:
    old = Schedule(1, watermark=7)
    assert compute(old, node("a", 9), node("b", 9)).watermark == 7


def test_a_missing_node_stops_the_watermark_and_new_names_but_not_what_is_due() -> None:
    old = Schedule(1, watermark=7, due=(8, 9), named_through=9)
    found = compute(old, node("a", 8, folded=frozenset({8})))
    assert (found.watermark, found.due) == (7, (8, 9))
    assert "b" in found.paused


def test_a_node_that_is_away_or_cut_off_pauses_and_is_named() -> None:
    old = Schedule(1, watermark=7, due=(8, 9), named_through=9)
    facts = [node("a", 8, unreachable=("b",)), node("b", 8)]
    assert compute(old, *facts).paused == "a cannot reach b"
    found = next_schedule(
        old, generation=1, start_step=0, members=MEMBERS, facts=facts, every=1, slots=3, away={"b": "is away"}
    )
    assert "b is away" in found.paused
    assert found.due == (8, 9)


def test_a_step_that_one_rank_gives_up_is_given_up_by_all_and_replaced() -> None:
    old = Schedule(1, watermark=7, due=(8, 9), named_through=9)
    found = compute(old, node("a", 8, aborted=frozenset({8})), node("b", 8))
    assert 8 not in found.due
    assert found.aborted == (8,)
    assert found.due == (9, 10)


def test_a_late_step_widens_the_margin_and_good_ones_narrow_it() -> None:
    found: Schedule | None = Schedule(1, watermark=7, due=(8,), named_through=8)
    found = compute(found, node("a", 20, aborted=frozenset({8})), node("b", 20))
    assert found.margin_steps == 1
    assert min(found.due) == 22
    for step in itertools.count(22):
        found = compute(
            found, node("a", step, folded=frozenset({step})), node("b", step, folded=frozenset({step}))
        )
        if not found.margin_steps:
            break
        assert step < 40


def test_nothing_is_due_while_a_loss_is_not_finite() -> None:
    old = Schedule(1, watermark=7, due=(8, 9), named_through=9)
    found = compute(old, node("a", 8, held=True, aborted=frozenset({8})), node("b", 8))
    assert found.held and found.due == ()
    assert found.margin_steps == 0, "a bad loss is no lateness"
    again = compute(found, node("a", 12, aborted=frozenset({8})), node("b", 12))
    assert not again.held and again.due == (13, 14)


def test_what_is_begun_stays_due_for_a_party_that_takes_over() -> None:
    found = compute(None, node("a", 8, begun=frozenset({8}), watermark=7), node("b", 8, watermark=7))
    assert found.due == (8, 9)


def test_the_step_that_a_generation_resumed_from_is_not_due_again() -> None:
    found = compute(
        None, node("a", 6, begun=frozenset({6})), node("b", 6, begun=frozenset({6})), start_step=6
    )
    assert found.due == (7, 8)


def test_facts_and_schedules_of_other_generations_do_not_count() -> None:
    old = Schedule(0, watermark=99, due=(100,), named_through=100)
    stranger = replace(node("b", 50, folded=frozenset({50})), generation=0)
    found = compute(old, node("a", 5), stranger)
    assert (found.watermark, found.due) == (None, ())


@pytest.mark.parametrize(("every", "slots"), [(0, 3), (1, 1)])
def test_wrong_numbers_are_refused(every: int, slots: int) -> None:
    with pytest.raises(ValueError, match="found"):
        compute(None, node("a"), node("b"), every=every, slots=slots)


facts_strategy = st.builds(
    NodeFacts,
    node=st.sampled_from(MEMBERS),
    generation=st.integers(0, 2),
    completed=st.dictionaries(st.integers(0, 1), st.integers(0, 60), max_size=2),
    ready=st.booleans(),
    folded=st.frozensets(st.integers(0, 60), max_size=4),
    begun=st.frozensets(st.integers(0, 60), max_size=4),
    aborted=st.frozensets(st.integers(0, 60), max_size=4),
    held=st.sampled_from([False, False, False, True]),
    watermark=st.none() | st.integers(0, 60),
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.lists(facts_strategy, min_size=2, max_size=2), max_size=12),
    st.integers(1, 4),
    st.integers(2, 4),
)
def test_invariants_hold_whatever_is_reported(rounds: list[list[NodeFacts]], every: int, slots: int) -> None:
    previous: Schedule | None = None
    for facts in rounds:
        found = compute(previous, *facts, every=every, slots=slots)
        mark = found.watermark
        assert list(found.due) == sorted(set(found.due))
        assert mark is None or all(step > mark for step in (*found.due, *found.aborted))
        assert len(found.aborted) <= MAX_ABORTED
        assert not set(found.due) & set(found.aborted)
        if previous is not None:
            assert (mark or 0) >= (previous.watermark or 0)
            assert found.named_through >= previous.named_through
            begun = {s for f in facts for s in f.begun}
            new = set(found.due) - set(previous.due) - begun
            completed = [s for f in facts if f.generation == 1 for s in f.completed.values()]
            assert all(step % every == 0 and step > max(completed, default=0) for step in new)
            assert all(step > previous.named_through for step in new)
            if new:
                assert len(found.due) <= slots - 1
        previous = found


def test_the_wire_carries_the_schedule() -> None:
    for known in (Schedule(3), Schedule(3, 0, (5, 10), True, "why", (7,), named_through=10)):
        assert schedule.from_message(schedule.to_message(known)) == known


def test_facts_come_from_a_report_of_the_nodes_own_generation() -> None:
    roster = common_pb2.Roster(generation=2, members=[common_pb2.Member(node="a", ranks=[0, 1])])
    alive = coordinator_pb2.Trainer.ALIVE
    report = coordinator_pb2.JobReport(
        generation=2,
        roster=roster,
        trainers=[
            coordinator_pb2.Trainer(rank=0, generation=2, state=alive, step=4, ready=True),
            coordinator_pb2.Trainer(rank=1, generation=1, state=alive, step=9, ready=True),
        ],
        holdings=[
            coordinator_pb2.Holding(generation=2, step=3, folded=True),
            coordinator_pb2.Holding(generation=1, step=9, folded=True),
            coordinator_pb2.Holding(generation=2, step=4),
        ],
    )
    found = facts_of("a", report)
    assert found == NodeFacts("a", 2, {0: 4}, False, frozenset({3}), frozenset({3, 4}))
    report.trainers[1].generation = 2
    assert facts_of("a", report).ready
    report.trainers[1].state = coordinator_pb2.Trainer.DIED
    assert not facts_of("a", report).ready


class Cluster:
    """Ranks that complete steps, nodes that fold, and messages that take their time."""

    def __init__(
        self, seed: int, *, step_s: float, message_s: float, protect_s: float, every: int = 1, slots: int = 3
    ) -> None:
        self.random = random.Random(seed)
        self.step_s, self.message_s, self.protect_s = step_s, message_s, protect_s
        self.every, self.slots = every, slots
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.now = 0.0
        self.truth = {name: node(name, 0) for name in MEMBERS}
        self.seen = dict(self.truth)
        self.known: dict[str, Schedule] = {}
        self.schedule: Schedule | None = None
        self.captured: dict[str, set[int]] = {name: set() for name in MEMBERS}

    def after(self, delay: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now + delay * self.random.uniform(0.5, 1.0), next(self.order), act))

    def run(self, steps: int) -> None:
        for name in MEMBERS:
            self.report(name)
        self.after(10 * self.message_s, lambda: self.complete(1, steps))
        while self.queue:
            self.now, _, act = heapq.heappop(self.queue)
            act()

    def report(self, name: str) -> None:
        facts = self.truth[name]
        self.after(self.message_s, lambda: self.take(facts))

    def take(self, facts: NodeFacts) -> None:
        self.seen[facts.node] = facts
        found = compute(self.schedule, *self.seen.values(), every=self.every, slots=self.slots)
        if found != self.schedule:
            self.schedule = found
            for name in MEMBERS:
                self.after(self.message_s, lambda name=name: self.told(name, found))

    def told(self, name: str, found: Schedule) -> None:
        facts = self.truth[name]
        mark = found.watermark
        late = {s for s in found.due if s <= facts.completed[0] and s not in self.captured[name]}
        self.known[name] = found
        kept = {s for s in facts.folded if mark is None or s >= mark}
        self.truth[name] = replace(
            facts, aborted=facts.aborted | late, folded=frozenset(kept), watermark=mark or facts.watermark
        )
        if late:
            self.report(name)

    def complete(self, step: int, steps: int) -> None:
        for name in MEMBERS:
            self.truth[name] = replace(self.truth[name], completed={0: step})
            if name in self.known and step in self.known[name].due:
                self.captured[name].add(step)
                self.truth[name] = replace(self.truth[name], begun=self.truth[name].begun | {step})
                if all(step in self.captured[other] for other in MEMBERS):
                    for other in MEMBERS:
                        self.after(self.protect_s, lambda other=other: self.fold(other, step))
            self.report(name)
        if step < steps:
            self.after(self.step_s, lambda: self.complete(step + 1, steps))

    def fold(self, name: str, step: int) -> None:
        self.truth[name] = replace(self.truth[name], folded=self.truth[name].folded | {step})
        self.report(name)


@pytest.mark.parametrize("seed", range(5))
def test_every_step_is_protected_where_protection_is_faster_than_a_step(seed: int) -> None:
    cluster = Cluster(seed, step_s=0.1, message_s=0.005, protect_s=0.06)
    cluster.run(100)
    assert cluster.captured["a"] == cluster.captured["b"] == set(range(1, 101))
    assert cluster.schedule is not None and cluster.schedule.watermark == 100


@pytest.mark.parametrize("seed", range(5))
def test_slow_protection_leaves_gaps_and_gives_little_up(seed: int) -> None:
    cluster = Cluster(seed, step_s=0.1, message_s=0.005, protect_s=0.5)
    cluster.run(100)
    assert cluster.schedule is not None and (cluster.schedule.watermark or 0) >= 90
    # Named just when a rank completed it: that happens, and is rare.
    assert len(cluster.truth["a"].aborted | cluster.truth["b"].aborted) <= 3
    assert 20 <= len(cluster.captured["a"]) < 60


@pytest.mark.parametrize("seed", range(5))
def test_steps_faster_than_messages_are_named_far_enough_ahead(seed: int) -> None:
    """Several steps pass while a message is under way: the margin grows until names come in time."""
    cluster = Cluster(seed, step_s=0.002, message_s=0.008, protect_s=0.01)
    cluster.run(2000)
    given_up = cluster.truth["a"].aborted | cluster.truth["b"].aborted
    print(f"seed {seed}: {len(given_up)} given up, {len(cluster.captured['a'])} captured")
    assert cluster.schedule is not None and (cluster.schedule.watermark or 0) > 1900
    assert len(given_up) < len(cluster.captured["a"]) / 3


# Background flushes


def flushing(name: str, step: int, **facts: object) -> NodeFacts:
    return node(name, step, **{"flush_every": 5, **facts})


def test_one_step_at_a_time_is_named_for_the_store_when_it_is_named_at_all() -> None:
    first = compute(None, flushing("a", 3), flushing("b", 3))
    assert (first.due, first.flush) == ((4, 5), 5)
    # Until every node is done with it, it stands, whatever else is named.
    folded = frozenset({4, 5})
    second = compute(first, flushing("a", 5, folded=folded, flush_over=5), flushing("b", 5, folded=folded))
    assert (second.due, second.flush) == ((6, 7), 5)
    third = compute(second, flushing("a", 5, flush_over=5), flushing("b", 5, flush_over=5))
    assert third.flush == 0, "6 and 7 were named before, and 10 is not near"
    steps = frozenset(range(6, 10))
    fourth = compute(
        third,
        flushing("a", 9, flush_over=5, folded=steps),
        flushing("b", 9, flush_over=5, folded=steps),
    )
    assert fourth.due == (10, 11) and fourth.flush == 10


def test_a_step_that_is_given_up_is_not_waited_for() -> None:
    first = compute(None, flushing("a", 3), flushing("b", 3))
    aborted = frozenset({5})
    second = compute(first, flushing("a", 5, aborted=aborted), flushing("b", 5))
    assert second.flush != 5


def test_nothing_is_flushed_where_one_node_is_not_set_to() -> None:
    assert compute(None, flushing("a", 4), flushing("b", 4, flush_every=0)).flush == 0


def test_a_node_about_to_end_makes_the_watermark_the_next_and_says_so() -> None:
    folded = frozenset({3})
    first = compute(None, flushing("a", 3, folded=folded), flushing("b", 3, folded=folded, leaving=True))
    assert (first.watermark, first.flush) == (3, 3)
    assert first.stopping == "node b is told to end"
    done = compute(first, flushing("a", 3, flush_over=3), flushing("b", 3, flush_over=3, leaving=True))
    assert done.flush == 0, "it is durable"
    newer = frozenset({4})
    last = compute(
        done,
        flushing("a", 4, folded=newer, flush_over=3),
        flushing("b", 4, folded=newer, flush_over=3, leaving=True),
    )
    assert last.flush == 4
