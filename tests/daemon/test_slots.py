"""Slots and grants: what is given to whom, and when it may be given again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import JOB, PLAN, SIZES, Cluster, image, until
from daemonkit import looped
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.daemon.job import Job, State, Trainer, rank_seal
from ckptd.daemon.job_memory import JobMemory
from ckptd.errors import InvalidRequest, NoSpace, StaleGeneration
from ckptd.image.digest import CELL_BYTES, cell_digests
from ckptd.memory.holding import Holding, Parity
from ckptd.v1 import common_pb2, coordinator_pb2, local_pb2

SIZE = 100


class Lone:
    """One node's job without a daemon around it: two ranks, directives by hand."""

    def __init__(self, directory: Path, slots: int = 3, nodes: int = 1, parity: int = 0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.changes = 0
        self.job = Job(JOB, "n0", directory, -1, self._changed)
        self.job.set_spec(coordinator_pb2.JobSpec(job=JOB, slots=slots, every=1, parity=parity))
        self.nodes, self.parity = nodes, parity

    def _changed(self) -> None:
        self.changes += 1

    def roster(self, generation: int, start: tuple[int, int] = (0, 0)) -> common_pb2.Roster:
        members = [common_pb2.Member(node=f"n{i}", ranks=[2 * i, 2 * i + 1]) for i in range(self.nodes)]
        where = common_pb2.Snapshot(generation=start[0], step=start[1])
        return common_pb2.Roster(generation=generation, members=members, parity=self.parity, start=where)

    def begin(self, generation: int, start: tuple[int, int] = (0, 0)) -> list[Trainer]:
        """A generation with both of its trainers, planned."""
        self.job.accept(self.roster(generation, start))
        for rank in (0, 1):
            trainer = Trainer(rank, generation, 0, attached=True, step=start[1])
            self.job.trainers[rank] = trainer
            self.job.place_plan(trainer, local_pb2.Plan(plan_hash=PLAN, image_bytes=SIZE), 1 << 40, {})
        return [self.job.trainers[rank] for rank in (0, 1)]

    def schedule(self, due: list[int], watermark: int | None = None, aborted: tuple[int, ...] = ()) -> None:
        self.job.apply(
            common_pb2.Schedule(
                generation=self.job.generation,
                due=due,
                has_watermark=watermark is not None,
                watermark=watermark or 0,
                aborted=aborted,
            )
        )

    def granted(self, rank: int = 0) -> dict[int, int]:
        return {step: place.slot for step, place in self.job.grants.get(rank, {}).items()}

    def capture(self, rank: int, step: int) -> Holding:
        """Captures and digests at once."""
        trainer = self.job.trainers[rank]
        message = local_pb2.Captured(step=step, slot=self.granted(rank)[step], plan_hash=PLAN)
        holding = self.job.captured(trainer, message)
        trainer.step = max(trainer.step, step)
        place = holding.places[rank]
        if holding.seal_rank(rank_seal(rank, place, cell_digests(place.image)), JOB):
            holding.folded = not holding.protected_group
        return holding


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[Lone]:
    lone = Lone(tmp_path / "jobs" / JOB)
    yield lone
    lone.job.discard()


def test_due_steps_get_free_slots_and_no_more_than_there_are(lone: Lone) -> None:
    lone.begin(1)
    lone.schedule([1, 2])
    assert lone.granted(0) == lone.granted(1) == {1: 0, 2: 1}
    lone.schedule([1, 2, 3, 4])
    assert lone.granted() == {1: 0, 2: 1, 3: 2}  # the fourth waits for a slot
    lone.schedule([1, 2, 3, 4])
    assert lone.granted() == {1: 0, 2: 1, 3: 2}


def test_a_step_that_is_no_longer_due_gives_its_slot_back(lone: Lone) -> None:
    lone.begin(1)
    lone.schedule([1, 2])
    lone.schedule([2, 3])
    assert lone.granted() == {2: 1, 3: 0}


def test_the_past_is_not_granted(lone: Lone) -> None:
    [trainer, _] = lone.begin(1)
    trainer.step = 5
    lone.schedule([4, 5, 6])
    assert set(lone.granted(0)) == {6} and set(lone.granted(1)) == {4, 5, 6}


def test_the_watermarks_slot_stays_and_the_ones_before_it_come_back(lone: Lone) -> None:
    lone.begin(1)
    lone.schedule([1, 2, 3])
    for step in (1, 2, 3):
        for rank in (0, 1):
            lone.capture(rank, step)
    lone.schedule([4, 5], watermark=1)
    assert lone.granted() == {}, "steps 1, 2 and 3 are all needed still"
    lone.schedule([4, 5], watermark=2)
    assert lone.granted() == {4: 0}
    assert set(lone.job.memory.holdings) == {(1, 2), (1, 3)}
    lone.schedule([4, 5], watermark=3)
    assert lone.granted() == {4: 0, 5: 1}
    assert set(lone.job.memory.holdings) == {(1, 3)}


def test_a_watermark_never_goes_back(lone: Lone) -> None:
    lone.begin(1)
    lone.schedule([1, 2])
    for rank in (0, 1):
        lone.capture(rank, 1)
        lone.capture(rank, 2)
    lone.schedule([3], watermark=2)
    lone.schedule([3], watermark=1)
    assert lone.job.schedule.watermark == 2
    lone.schedule([3])
    assert lone.job.schedule.has_watermark and lone.job.schedule.watermark == 2
    lone.job.apply(common_pb2.Schedule(generation=7, has_watermark=True, watermark=100, due=[101]))
    lone.job.apply(common_pb2.Schedule(has_watermark=True, watermark=100, due=[101]))
    assert lone.job.schedule.watermark == 2 and set(lone.job.memory.holdings) == {(1, 2)}


def test_a_captured_step_is_granted_once(lone: Lone) -> None:
    [trainer, _] = lone.begin(1)
    lone.schedule([1])
    holding = lone.capture(0, 1)
    trainer.step = 0  # the progress message is still on its way
    lone.schedule([1, 2])
    assert set(lone.granted(0)) == {2} and set(lone.granted(1)) == {1, 2}
    with pytest.raises(InvalidRequest, match="no grant"):
        lone.job.captured(trainer, local_pb2.Captured(step=1, slot=0, plan_hash=PLAN))
    # The second word about it has done no harm to the first.
    assert lone.job.memory.holdings[1, 1] is holding and 1 not in lone.job.aborted


def test_an_abort_frees_at_once_and_the_step_never_returns(lone: Lone) -> None:
    lone.begin(1)
    lone.schedule([1, 2])
    lone.capture(0, 1)
    changes = lone.changes
    lone.job.abort(1)
    assert (1, 1) not in lone.job.memory.holdings and lone.changes > changes
    arena = lone.job.memory.rank_arena(0, PLAN)
    assert arena is not None and 0 in lone.job.memory.free_slots(arena)
    assert list(lone.job.report().aborted) == [1]
    # The job gives it up: the rank that had not captured it loses its grant.
    lone.schedule([2, 3], aborted=(1,))
    assert lone.granted(0) == {2: 1, 3: 0} and set(lone.granted(1)) == {2, 3}
    with pytest.raises(InvalidRequest):
        lone.job.captured(lone.job.trainers[1], local_pb2.Captured(step=1, slot=0, plan_hash=PLAN))


def test_an_image_that_comes_after_the_jobs_abort_is_freed_with_it(lone: Lone) -> None:
    lone.begin(1)
    lone.schedule([1])
    lone.capture(0, 1)
    lone.schedule([2], aborted=(1,))
    assert (1, 1) not in lone.job.memory.holdings


def test_what_others_count_on_cannot_be_aborted(lone: Lone) -> None:
    """The watermark, what came before it, what was reported as folded, and where the generation began."""
    lone.begin(1)
    lone.schedule([1, 2, 3])
    for step in (1, 2):
        for rank in (0, 1):
            lone.capture(rank, step)
    lone.schedule([3], watermark=1)
    for step in (1, 2, 0):
        lone.job.abort(step)
    assert set(lone.job.memory.holdings) == {(1, 1), (1, 2)} and not lone.job.aborted
    lone.begin(2, (1, 2))
    lone.job.reseal_start()
    lone.job.memory.holdings[2, 2].folded = False
    lone.job.abort(2)
    assert (2, 2) in lone.job.memory.holdings


def test_a_lost_image_is_given_up_and_not_waited_for(lone: Lone) -> None:
    """After a restart of the daemon the trainer's word may name a slot that is granted no more."""
    [trainer, _] = lone.begin(1)
    lone.schedule([1])
    lone.job.grants.clear()
    with pytest.raises(InvalidRequest):
        lone.job.captured(trainer, local_pb2.Captured(step=1, slot=2, plan_hash=PLAN))
    assert lone.job.aborted == {1}


# Generations


def test_generation_numbers_only_grow(lone: Lone) -> None:
    lone.begin(3)
    with pytest.raises(StaleGeneration) as caught:
        lone.job.accept(lone.roster(2))
    assert "at generation 3" in str(caught.value) and "generation 2" in str(caught.value)
    lone.schedule([1])
    lone.job.accept(lone.roster(3, (1, 9)))  # the same number again changes nothing
    assert lone.job.generation == 3 and lone.job.roster.start.step == 0 and lone.granted()
    for generation in (0, 1, 2):
        with pytest.raises(StaleGeneration):
            lone.job.refuse_stale(generation)
    lone.job.refuse_stale(3)


def test_older_holdings_stay_until_the_new_generation_has_a_watermark(lone: Lone) -> None:
    lone.begin(1)
    lone.schedule([1, 2, 3])
    for step in (1, 2, 3):
        for rank in (0, 1):
            lone.capture(rank, step)
    lone.begin(2, (1, 2))
    assert set(lone.job.memory.holdings) == {(1, 1), (1, 2)}, "what lies beyond the start is void"
    lone.job.reseal_start()
    lone.schedule([3])
    assert set(lone.job.memory.holdings) == {(1, 1), (1, 2), (2, 2)}
    taken = {h.places[0].slot for h in lone.job.memory.holdings.values()}
    assert not taken & set(lone.granted().values())
    lone.schedule([3], watermark=2)
    assert set(lone.job.memory.holdings) == {(2, 2)}
    # It lies where it lay.
    assert lone.job.memory.holdings[2, 2].places[0].slot == 1
    assert 1 not in lone.granted().values()


def test_what_is_half_there_ends_with_its_generation(lone: Lone) -> None:
    lone.begin(1)
    lone.schedule([1, 2])
    for rank in (0, 1):
        lone.capture(rank, 1)
    message = local_pb2.Captured(step=2, slot=lone.granted(0)[2], plan_hash=PLAN)
    lone.job.captured(lone.job.trainers[0], message)  # never digested
    lone.job.accept(lone.roster(2, (1, 1)))
    assert set(lone.job.memory.holdings) == {(1, 1)}
    assert not lone.job.grants and not lone.job.schedule.due and not lone.job.schedule.has_watermark


def test_stop_takes_the_grants_and_refuses_the_past(lone: Lone) -> None:
    [trainer, _] = lone.begin(1)
    lone.schedule([1])
    lone.job.order_stop(1)
    assert not lone.job.grants
    with pytest.raises(StaleGeneration):
        lone.job.refuse_stale(1)
    lone.schedule([1, 2])
    assert not lone.job.grants, "a stopped generation is granted nothing"
    lone.job.order_stop(0)  # an older order is no order
    assert lone.job.stop_through == 1
    assert lone.job.stopped_through == 0, "rank 0 and 1 live"
    trainer.state = State.DIED
    assert lone.job.stopped_through == 0
    lone.job.trainers[1].state = State.FINISHED
    lone.job.digesting = 1
    assert lone.job.stopped_through == 0, "an image is still being digested"
    lone.job.digesting = 0
    assert lone.job.stopped_through == 1
    # Where a launcher was told to start, its word is needed: it may just be forking.
    lone.job.started_generation = 1
    assert lone.job.stopped_through == 0
    lone.job.confirmed_stopped = 1
    assert lone.job.stopped_through == 1


def test_a_parked_job_lives_again_with_its_next_generation(lone: Lone) -> None:
    lone.begin(1)
    lone.job.finished = True
    lone.begin(2)
    assert not lone.job.finished


# Plans and space


def test_a_plan_that_does_not_fit_changes_nothing(lone: Lone) -> None:
    [trainer, _] = lone.begin(1)
    lone.schedule([1])
    before = lone.granted()
    for plan in (
        local_pb2.Plan(plan_hash=b"q" * 16, image_bytes=1 << 40),
        local_pb2.Plan(plan_hash=b"q" * 16, image_bytes=(1 << 64) - 1),
    ):
        with pytest.raises(NoSpace):
            lone.job.place_plan(trainer, plan, 1 << 30, {"other": 5})
    for plan in (
        local_pb2.Plan(plan_hash=b"q" * 15, image_bytes=1),
        local_pb2.Plan(plan_hash=b"q" * 16, image_bytes=0),
        local_pb2.Plan(plan_hash=PLAN, image_bytes=CELL_BYTES + 1),
    ):
        with pytest.raises(InvalidRequest):
            lone.job.place_plan(trainer, plan, 1 << 40, {})
    assert (lone.granted(), trainer.plan_hash, trainer.image_bytes) == (before, PLAN, SIZE)
    assert {key for key in lone.job.memory.arenas if key[0] == "rank-00000"} == {("rank-00000", PLAN)}


def test_a_replaced_plans_arena_goes_when_nothing_is_held_in_it(lone: Lone) -> None:
    [trainer, _] = lone.begin(1)
    lone.schedule([1, 2])
    for rank in (0, 1):
        lone.capture(rank, 1)
    other = local_pb2.Plan(plan_hash=b"q" * 16, image_bytes=3 * CELL_BYTES)
    lone.job.place_plan(trainer, other, 1 << 40, {})
    assert lone.granted(0) == {}, "a slot of the old arena is granted no more"
    assert lone.job.memory.rank_arena(0, PLAN) is not None, "step 1 lies in it"
    lone.schedule([2, 3])
    assert set(lone.granted(0)) == {2, 3}
    trainer.plan_hash = b"q" * 16
    for rank in (0, 1):
        step, slot = 2, lone.granted(rank)[2]
        captured = local_pb2.Captured(step=step, slot=slot, plan_hash=lone.job.trainers[rank].plan_hash)
        holding = lone.job.captured(lone.job.trainers[rank], captured)
        holding.seal_rank(rank_seal(rank, holding.places[rank], bytes(16)), JOB)
    lone.schedule([3], watermark=2)
    assert lone.job.memory.rank_arena(0, PLAN) is None
    assert lone.job.memory.rank_arena(1, PLAN) is not None
    assert len(list(lone.job.directory.glob("rank-00000.*.arena"))) == 1


# The one rule, over any course of events


@settings(deadline=None, max_examples=30)
@given(data=st.data(), slots=st.integers(2, 4))
def test_no_slot_that_may_still_be_needed_is_granted(data: st.DataObject, slots: int) -> None:
    """A slot of step s is granted again only if the watermark is greater, or s was given up or is void."""
    with tempfile.TemporaryDirectory() as name:
        lone = Lone(Path(name) / "jobs" / JOB, slots=slots)
        generation, newest, watermark, start = 1, 0, None, 0
        lone.begin(1)
        given_up: set[tuple[int, int]] = set()
        # What was captured last in each slot of each rank.
        content: dict[tuple[int, int], tuple[int, int]] = {}

        def check() -> None:
            for rank in (0, 1):
                places = lone.granted(rank)
                assert len(set(places.values())) == len(places), "one slot for two steps"
                for slot in places.values():
                    held = content.get((rank, slot))
                    if held is None or held in given_up:
                        continue
                    if held[0] == generation:
                        assert watermark is not None and watermark > held[1], (held, watermark, places)
                    else:
                        assert held[1] > start or watermark is not None, (held, start, places)

        for _ in range(data.draw(st.integers(5, 25))):
            event = data.draw(st.sampled_from(["name", "capture", "capture", "protect", "abort", "incident"]))
            due = [s for s in range(newest - 2, newest + slots) if s > max(newest, 0)]
            if event == "name":
                lone.schedule(due, watermark, tuple(s for g, s in given_up if g == generation))
            elif event == "capture":
                rank = data.draw(st.sampled_from([0, 1]))
                if lone.granted(rank):
                    step = min(lone.granted(rank))
                    content[rank, lone.granted(rank)[step]] = (generation, step)
                    lone.capture(rank, step)
                    newest = max(newest, step)
            elif event == "protect":
                sealed = [
                    h.step for h in lone.job.memory.holdings.values() if h.key[0] == generation and h.sealed
                ]
                if sealed and max(sealed) > (watermark if watermark is not None else -1):
                    watermark = max(sealed)
                    lone.schedule([s for s in due if s > watermark], watermark)
                    # These were free by the rule, and stay so in a later generation.
                    given_up |= {at for at in content.values() if at[0] == generation and at[1] < watermark}
            elif event == "abort":
                step = data.draw(st.integers(1, newest + 2))
                lone.job.abort(step)
                if step in lone.job.aborted:
                    given_up.add((generation, step))
            elif event == "incident":
                whole = [h for h in lone.job.memory.holdings.values() if h.sealed]
                if whole:
                    begin = max(whole, key=lambda h: (h.step, h.generation))
                    generation, start, watermark = generation + 1, begin.step, None
                    lone.begin(generation, begin.key)
                    lone.job.reseal_start()
                    for rank in (0, 1):
                        content[rank, begin.places[rank].slot] = (generation, start)
                    newest = start
            check()
        lone.job.discard()


# Parity slots


def _parity(memory: JobMemory, key: tuple[int, int], slot: int, *, folded: bool) -> Holding:
    holding = Holding(*key, ("n0", "n1"), "n0", 1, (0,), folded=folded)
    holding.parity = Parity(slot, CELL_BYTES, [memoryview(bytes(CELL_BYTES))], [bytes(16)] if folded else [])
    memory.holdings[key] = holding
    return holding


@looped
async def test_parity_slots_are_as_many_as_steps_and_come_back(tmp_path: Path) -> None:
    memory = JobMemory(JOB, "n0", tmp_path)
    placed = []
    for step in (1, 2, 3, 4):
        holding = Holding(1, step, ("n0", "n1"), "n0", 1, (0,))
        memory.holdings[holding.key] = holding
        holding.parity = memory.place_parity(holding, CELL_BYTES, 3, (0, 0))
        placed.append(holding.parity.slot if holding.parity else None)
    assert placed == [0, 1, 2, None]
    freed = memory.freed
    memory.release((1, 2))
    assert freed.is_set()
    again = memory.place_parity(memory.holdings[1, 4], 2 * CELL_BYTES, 3, (0, 0))
    assert again is not None and again.slot == 1
    assert [len(chunk) for chunk in again.chunks] == [2 * CELL_BYTES]  # the arena has grown with it
    memory.discard()
    assert list(tmp_path.iterdir()) == []


def test_unfolded_parity_of_older_generations_goes_first(tmp_path: Path) -> None:
    memory = JobMemory(JOB, "n0", tmp_path)
    old = [
        _parity(memory, (1, 8), 0, folded=True),
        _parity(memory, (1, 9), 1, folded=False),
        _parity(memory, (1, 7), 2, folded=True),
    ]
    newer = Holding(2, 8, ("n0", "n1"), "n0", 1, (0,))
    memory.holdings[newer.key] = newer
    newer.parity = memory.place_parity(newer, CELL_BYTES, 3, (1, 8))
    assert newer.parity is not None and newer.parity.slot == 1
    assert [h.parity is not None for h in old] == [True, False, True]
    following = Holding(2, 9, ("n0", "n1"), "n0", 1, (0,))
    memory.holdings[following.key] = following
    following.parity = memory.place_parity(following, CELL_BYTES, 3, (1, 8))
    assert following.parity is not None and following.parity.slot == 2
    assert [(h.parity is not None, h.folded) for h in old] == [(True, True), (False, False), (False, False)]


@pytest.mark.parametrize("start", [(1, 8), (2, 8)])
def test_the_last_parity_of_the_start_stays_until_there_is_a_watermark(
    tmp_path: Path, start: tuple[int, int]
) -> None:
    """Between an incident and the first newly protected step nothing else protects the job."""
    memory = JobMemory(JOB, "n0", tmp_path)
    start_parity = _parity(memory, (1, 8), 0, folded=True)
    generation = start[0] + 1
    resealed = Holding(generation, 8, ("n0", "n1"), "n0", 1, (0,))
    memory.holdings[resealed.key] = resealed
    resealed.parity = memory.place_parity(resealed, CELL_BYTES, 2, start)
    assert resealed.parity is not None and resealed.parity.slot == 1
    following = Holding(generation, 9, ("n0", "n1"), "n0", 1, (0,))
    memory.holdings[following.key] = following
    assert memory.place_parity(following, CELL_BYTES, 2, start) is None
    assert start_parity.folded and start_parity.parity is not None
    # The watermark of the new generation frees it.
    memory.release_unneeded(generation, 8, [])
    place = memory.place_parity(following, CELL_BYTES, 2, start)
    assert place is not None and place.slot == 0


@looped
async def test_a_new_generation_is_protected_before_the_old_one_lets_go(tmp_path: Path) -> None:
    """Over real sockets, two slots: the resumed step is folded again, then the next ones get the places."""
    names = ["n0", "n1", "n2"]
    cluster = Cluster(tmp_path, 3, 1, slots=2)
    try:
        cluster.direct(names, cluster.roster(names, 1))
        for name in names:
            cluster.plan(name, SIZES[2])
        cluster.schedule(names, 1, [5])
        for name in names:
            cluster.capture(name, 5)
        await until(lambda: cluster.folded(5, names), "step 5")
        cluster.schedule(names, 1, [6], watermark=5)
        cluster.capture("n0", 6)  # void: the others never take it
        transfer = coordinator_pb2.TransferOrder(generation=2)
        cluster.direct(names, cluster.roster(names, 2, (1, 5)), transfer=transfer)
        await until(lambda: cluster.folded(5, names, 2), "step 5 again")
        for name in names:
            assert {(1, 5), (2, 5)} == set(cluster.job(name).memory.holdings)
            cluster.plan(name, SIZES[2])
        # Before the watermark is known, step 6 can be captured; its parity waits for a place.
        cluster.schedule(names, 2, [6])
        for name in names:
            cluster.capture(name, 6)
        await until(lambda: all((2, 6) in cluster.job(n).memory.holdings for n in names), "step 6 captured")
        for name in names:
            old = cluster.job(name).memory.holdings[1, 5]
            assert old.folded and old.parity is not None
        cluster.schedule(names, 2, [7], watermark=5)
        await until(lambda: cluster.folded(6, names, 2), "step 6")
        for name in names:
            job = cluster.job(name)
            assert set(job.memory.holdings) == {(2, 5), (2, 6)}
            assert not job.grants.get(job.trainers[names.index(name)].rank), "both slots are needed"
        cluster.schedule(names, 2, [7], watermark=6)
        for index, name in enumerate(names):
            assert set(cluster.job(name).grants[index]) == {7}
            assert bytes(cluster.job(name).memory.holdings[2, 6].places[index].image) == image(
                index, 6, SIZES[2]
            )
    finally:
        cluster.close()


@looped
async def test_a_peer_that_stays_away_is_away_for_the_next_generation_too(tmp_path: Path) -> None:
    """The connection broke once, and that is still why nothing becomes protected."""
    names = ["n0", "n1"]
    cluster = Cluster(tmp_path, 2, 1)
    try:
        cluster.direct(names, cluster.roster(names, 1))
        roster = cluster.roster(names, 2)
        cluster.kill("n1")
        job = cluster.job("n0")
        await until(lambda: job.unreachable == {"n1"}, "the loss is noticed")
        cluster.direct(["n0"], roster)
        assert job.generation == 2 and job.unreachable == {"n1"}
        assert list(job.report().unreachable_peers) == ["n1"]
    finally:
        cluster.close()
