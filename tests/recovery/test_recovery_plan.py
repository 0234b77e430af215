"""Who takes which ranks, by which rung, from whom; the assignment against brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from ckptd.memory.inventory import Choice, Fresh, GroupState, Member, Position, Roster, Snapshot
from ckptd.recovery.assignment import Candidate, Seat, assign
from ckptd.recovery.ladder import Rung, price, steepest
from ckptd.recovery.plan import Volunteer, make_plan, seats_of

GIB = 1 << 30
ADDRESSES = {name: f"{name}:2" for name in "abcdefgh"}


def group(nodes: str, lost: str = "", parity: int = 1, first: int = 0) -> GroupState:
    positions = tuple(
        Position(
            name,
            (first + i,),
            () if name in lost else (name,),
            () if name in lost else (name,),
            0 if name in lost else GIB,
        )
        for i, name in enumerate(nodes)
    )
    return GroupState(positions, parity)


def last(nodes: str, generation: int = 1) -> Roster:
    return Roster(generation, tuple(Member(name, "", (i,)) for i, name in enumerate(nodes)), 1)


def plan_of(choice: Choice | Fresh, roster: Roster | None, living: str, **domains: str):
    volunteers = [Volunteer(n, domains.get(n, ""), f"{n}:1", f"{n}:2", n, 7) for n in living]
    return make_plan(2, choice, volunteers, seats_of(choice, roster, 4, 1), 1, ADDRESSES)


def test_a_spare_takes_the_lost_seat_and_survivors_keep_theirs() -> None:
    choice = Choice(Snapshot(1, 12), (group("abcd", lost="c"),))
    plan = plan_of(choice, last("abcd"), "abde")
    assert plan.roster.nodes == ("a", "b", "e", "d")
    assert plan.roster.start == Snapshot(1, 12) and plan.roster.generation == 2
    assert plan.rung == Rung.PARITY
    order = plan.order("e")
    assert order is not None and order.positions == ("c",)
    assert {(s.node, s.position) for s in order.sources} == {("a", "a"), ("b", "b"), ("d", "d")}
    assert order.group == tuple("abcd") and order.moved_bytes == 3 * GIB
    own = plan.order("a")
    assert own is not None and (own.positions, own.sources, own.rung) == ((), (), Rung.OWN_MEMORY)
    assert (plan.master_host, plan.master_port) == ("a", 7)
    print(plan.describe())
    assert "e takes ranks 2 of c" in plan.describe()


def test_the_node_that_takes_rank_0_names_the_meeting_place() -> None:
    choice = Choice(Snapshot(1, 12), (group("abcd", lost="a"),))
    assert plan_of(choice, last("abcd"), "bcde").master_host == "e"


def test_a_node_that_holds_the_lost_image_is_cheaper_than_an_empty_spare() -> None:
    state = group("abcd", lost="c")
    with_copy = Position("c", (2,), ("f",), (), GIB)
    state = GroupState((*state.positions[:2], with_copy, state.positions[3]), 1)
    plan = plan_of(Choice(Snapshot(1, 12), (state,)), last("abcd"), "abdef")
    assert plan.roster.nodes == ("a", "b", "f", "d")
    assert plan.rung == Rung.OWN_MEMORY


def test_rungs_and_prices() -> None:
    four, mirror = group("abcd", lost="c"), group("ab", lost="b")
    assert price(four, four.positions[0], "a").rung == Rung.OWN_MEMORY
    assert price(four, four.positions[0], "e") == price(mirror, mirror.positions[0], "e")
    assert price(four, four.positions[0], "e").rung == Rung.REPLICA
    assert price(mirror, mirror.positions[1], "e").rung == Rung.REPLICA
    assert price(four, four.positions[2], "e").moved_bytes == 3 * GIB
    assert steepest([Rung.OWN_MEMORY, Rung.PARITY, Rung.REPLICA]) == Rung.PARITY
    assert steepest([]) == Rung.NONE


def test_a_fresh_start_moves_nothing() -> None:
    plan = plan_of(Fresh(), None, "abcde")
    assert plan.roster.nodes == tuple("abcd") and plan.orders == ()
    assert [m.ranks for m in plan.roster.members] == [(0,), (1,), (2,), (3,)]
    assert plan.rung == Rung.NONE


def test_a_spare_of_another_failure_domain_is_preferred() -> None:
    choice = Choice(Snapshot(1, 12), (group("abcd", lost="c"),))
    plan = plan_of(choice, last("abcd"), "abdef", a="r1", b="r2", d="r3", e="r1", f="r4")
    assert plan.roster.nodes == ("a", "b", "f", "d")


def test_a_node_whose_transfer_failed_is_chosen_last() -> None:
    seats = [Seat((0,), "a"), Seat((1,), "b")]
    doubtful = Candidate("a", "", (0, GIB), doubtful=True)
    other = Candidate("b", "", (GIB, 0))
    spare = Candidate("c", "", (3 * GIB, 3 * GIB))
    assert assign(seats, [doubtful, other, spare]) == ("c", "b")
    assert assign(seats, [doubtful, other]) == ("a", "b")


def test_too_few_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="found 1"):
        assign([Seat((0,)), Seat((1,))], [Candidate("a", "", (0, 0))])
    with pytest.raises(ValueError, match="prices"):
        assign([Seat((0,)), Seat((1,))], [Candidate("a", "", (0,)), Candidate("b", "", (0, 0))])
    assert assign([], [Candidate("a", "", ())]) == ()


@pytest.mark.parametrize("seed", range(20))
def test_no_assignment_moves_fewer_bytes(seed: int) -> None:
    rng = random.Random(seed)
    seats = [Seat((i,)) for i in range(rng.randint(1, 5))]
    candidates = [
        Candidate(f"n{i}", "", tuple(rng.randrange(50) << 20 for _ in seats))
        for i in range(rng.randint(len(seats), 6))
    ]
    chosen = assign(seats, candidates)
    assert len(set(chosen)) == len(seats)
    moved = {c.node: c.moved_bytes for c in candidates}
    found = sum(moved[node][i] for i, node in enumerate(chosen))
    best = min(
        sum(c.moved_bytes[i] for i, c in enumerate(some))
        for some in itertools.permutations(candidates, len(seats))
    )
    assert found == best
