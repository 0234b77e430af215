"""Which snapshot can be had from what is held: cases, and every loss of up to m nodes."""

from __future__ import annotations

import itertools

from ckptd.erasure.groups import cut
from ckptd.memory.inventory import (
    Choice,
    Fresh,
    HoldingFact,
    Member,
    Roster,
    Snapshot,
    Unrecoverable,
    newest_recoverable,
)

NODES = ("a", "b", "c", "d")


START = Snapshot()


def roster(
    generation: int = 1, nodes: tuple[str, ...] = NODES, parity: int = 1, start: Snapshot = START
) -> Roster:
    members = tuple(Member(name, "", (2 * i, 2 * i + 1)) for i, name in enumerate(nodes))
    return Roster(generation, members, parity, start)


def held(
    of: Roster, step: int, *, folded: bool = True, sealed: bool = True, without: str = ""
) -> dict[str, list[HoldingFact]]:
    """What all nodes of a roster hold of one step, but for those in `without`."""
    found = {}
    for group in cut([(m.node, m.domain) for m in of.members], of.parity):
        for member in of.members:
            if member.node in group and member.node not in without:
                fact = HoldingFact(
                    of.generation, step, group, member.node, member.ranks, of.parity, sealed, folded, 100
                )
                found[member.node] = [fact]
    return found


def merged(*parts: dict[str, list[HoldingFact]]) -> dict[str, list[HoldingFact]]:
    found: dict[str, list[HoldingFact]] = {}
    for part in parts:
        for name, facts in part.items():
            found.setdefault(name, []).extend(facts)
    return found


def choose(
    holdings: dict[str, list[HoldingFact]], *rosters: Roster, protected: bool = True, ranks: int = 8
) -> Choice | Fresh | Unrecoverable:
    known = {r.generation: r for r in rosters}
    return newest_recoverable(holdings, range(ranks), known, ever_protected=protected)


def test_the_newest_step_that_is_whole_wins() -> None:
    found = choose(merged(held(roster(), 11), held(roster(), 12)), roster())
    assert isinstance(found, Choice)
    assert found.snapshot == Snapshot(1, 12)
    (group,) = found.groups
    assert group.group == NODES and group.data_chunks == 3
    assert all(p.images == (p.name,) and p.parities == (p.name,) for p in group.positions)


def test_a_sealed_step_of_living_nodes_needs_no_parity() -> None:
    found = choose(merged(held(roster(), 11), held(roster(), 12, folded=False)), roster())
    assert isinstance(found, Choice) and found.snapshot.step == 12


def test_a_lost_node_is_decoded_from_folded_parity_of_that_very_step() -> None:
    found = choose(
        merged(held(roster(), 11, without="c"), held(roster(), 12, folded=False, without="c")), roster()
    )
    assert isinstance(found, Choice) and found.snapshot.step == 11
    assert found.groups[0].positions[2].images == ()
    assert found.groups[0].positions[2].ranks == (4, 5)
    assert found.refusals == ("step 12 of generation 1: group (a, b, c, d) has 2 of 3 symbols of stripe 0",)


def test_any_m_nodes_of_a_group_may_vanish_and_no_more() -> None:
    for parity in (1, 2, 3):
        nodes = tuple("abcdef")
        of = roster(nodes=nodes, parity=parity)
        for lost in range(parity + 2):
            for gone in itertools.combinations(nodes, lost):
                found = choose(held(of, 5, without="".join(gone)), of, ranks=12)
                if lost <= parity:
                    assert isinstance(found, Choice), (parity, gone)
                elif lost < len(nodes):
                    assert isinstance(found, Unrecoverable), (parity, gone)


def test_every_group_must_be_whole() -> None:
    nodes = tuple("abcdefghijklmnop")  # two groups
    of = roster(nodes=nodes)
    first, second = cut([(n, "") for n in nodes], 1)
    assert isinstance(choose(held(of, 5, without=first[0] + second[0]), of, ranks=32), Choice)
    found = choose(held(of, 5, without=first[0] + first[1]), of, ranks=32)
    assert isinstance(found, Unrecoverable)
    assert first[2] in found.refusals[0]


def test_a_group_of_which_nobody_lives_is_missed() -> None:
    nodes = tuple("abcdefghijklmnop")
    of = roster(nodes=nodes)
    first, _ = cut([(n, "") for n in nodes], 1)
    for known in ((of,), ()):
        found = choose(held(of, 5, without="".join(first)), *known, ranks=32)
        assert isinstance(found, Unrecoverable)


def test_of_equal_steps_the_newest_generation_wins_if_it_can_be_had() -> None:
    later = roster(2, ("a", "b", "e", "d"), start=Snapshot(1, 12))
    moved = {"e": [HoldingFact(1, 12, NODES, "c", (4, 5), 1, sealed=True)]}
    holdings = merged(held(roster(), 12, without="c"), moved, held(later, 12))
    found = choose(holdings, roster(), later)
    assert isinstance(found, Choice) and found.snapshot == Snapshot(2, 12)
    half = merged(held(roster(), 12, without="c"), moved, held(later, 12, folded=False, without="a"))
    found = choose(half, roster(), later)
    assert isinstance(found, Choice) and found.snapshot == Snapshot(1, 12)
    assert found.groups[0].positions[2].images == ("e",)


def test_an_older_generations_later_steps_are_void() -> None:
    later = roster(2, start=Snapshot(1, 10))
    found = choose(merged(held(roster(), 12), held(later, 11)), roster(), later)
    assert isinstance(found, Choice) and found.snapshot == Snapshot(2, 11)
    assert "void" in found.refusals[0]
    newest = roster(3, start=Snapshot(2, 11))
    found = choose(merged(held(roster(), 11), held(later, 9)), newest, later, roster())
    assert isinstance(found, Choice) and found.snapshot == Snapshot(2, 9), "generation 2 voids step 11 of 1"


def test_a_lost_positions_ranks_are_found_by_elimination() -> None:
    found = choose(held(roster(), 5, without="c"))
    assert isinstance(found, Choice)
    assert found.groups[0].positions[2].ranks == (4, 5)


def test_two_lost_positions_without_their_roster_are_not_guessed() -> None:
    of = roster(parity=2)
    assert isinstance(choose(held(of, 5, without="bc"), of), Choice)
    found = choose(held(of, 5, without="bc"))
    assert isinstance(found, Unrecoverable)
    assert "b, c" in found.refusals[0]


def test_fresh_only_if_nothing_was_ever_protected() -> None:
    assert isinstance(choose({}, protected=False), Fresh)
    assert isinstance(choose({}, roster(), protected=False), Fresh)
    assert isinstance(choose({}, protected=True), Unrecoverable)
    assert isinstance(choose({}, roster(2, start=Snapshot(1, 4)), protected=False), Unrecoverable)


def test_a_first_step_that_is_not_whole_does_not_keep_a_job_from_starting_afresh() -> None:
    half = held(roster(), 1, folded=False, without="c")
    assert isinstance(choose(half, roster(), protected=False), Fresh)


def test_a_first_step_that_may_have_been_protected_is_waited_for() -> None:
    """All survivors folded it: the lost nodes may have, too, and then it was protected."""
    rest = held(roster(), 1, without="cd")
    assert isinstance(choose(rest, roster(), protected=False), Unrecoverable)


def test_a_group_without_parity_needs_every_image() -> None:
    alone = roster(nodes=("a",))
    assert isinstance(choose(held(alone, 5), alone, ranks=2), Choice)
    bare = roster(nodes=("a", "b"), parity=0)
    found = choose(held(bare, 5, without="b"), bare, ranks=4)
    assert isinstance(found, Unrecoverable)
    assert "no parity" in found.refusals[0]


def test_holdings_of_another_number_of_ranks_are_refused() -> None:
    found = choose(held(roster(), 5), roster(), ranks=6)
    assert isinstance(found, Unrecoverable)
    assert "the job has" in found.refusals[0]
