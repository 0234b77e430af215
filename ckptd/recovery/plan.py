"""The plan of one recovery: a value that can be printed before anything moves.

From the snapshot that can be had and the nodes that live: the next roster, and for
every node what it has to bring and from where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptd.memory.inventory import Choice, Fresh, GroupState, Member, Position, Roster, Snapshot
from ckptd.recovery.assignment import Candidate, Seat, assign
from ckptd.recovery.ladder import Price, Rung, price, steepest


@dataclass(frozen=True)
class Volunteer:
    """A living node that may get ranks, with its addresses."""

    node: str
    domain: str = ""
    control_address: str = ""
    bulk_address: str = ""
    # Where the process group of rank 0 may meet if rank 0 comes here.
    rendezvous_host: str = ""
    rendezvous_port: int = 0
    doubtful: bool = False


@dataclass(frozen=True)
class Source:
    """`node` (reachable at bulk_address) now stands for `position` of the old group."""

    node: str
    bulk_address: str
    position: str


@dataclass(frozen=True)
class TransferOrder:
    """What one member brings; no positions: its image is there and is only verified."""

    node: str
    rung: Rung
    positions: tuple[str, ...]
    sources: tuple[Source, ...]
    # The old group in order and its parity.
    group: tuple[str, ...]
    parity: int
    moved_bytes: int


@dataclass(frozen=True)
class Plan:
    """One generation: its roster, the transfers that fill it, where its ranks meet, and why so."""

    roster: Roster
    orders: tuple[TransferOrder, ...]
    master_host: str
    master_port: int
    rung: Rung
    # One line each, for people.
    reasons: tuple[str, ...]

    def order(self, node: str) -> TransferOrder | None:
        return next((order for order in self.orders if order.node == node), None)

    def describe(self) -> str:
        """The plan as text, one line per member."""
        start = self.roster.start
        lines = [f"generation {self.roster.generation} from step {start.step} ({self.rung})"]
        for member in self.roster.members:
            order = self.order(member.node)
            fresh = "from storage" if self.rung == Rung.STORAGE else "starts fresh"
            how = fresh if order is None else str(order.rung)
            if order is not None and order.positions:
                how += f" of {', '.join(order.positions)}, {order.moved_bytes:,} bytes"
            lines.append(f"  {member.node}: ranks {_span(member.ranks)}, {how}")
        return "\n".join([*lines, *(f"  {reason}" for reason in self.reasons)])


def make_plan(
    generation: int,
    choice: Choice | Fresh,
    volunteers: Sequence[Volunteer],
    seats: Sequence[Seat],
    parity: int,
    bulk_addresses: dict[str, str],
) -> Plan:
    """The cheapest plan that gives every seat a node.

    Args:
        generation: of the roster to be; greater than any seen.
        volunteers: the nodes that may get ranks, at least as many as seats.
        seats: blocks of ranks, with their last holders; in rank order.
        bulk_addresses: of every living node that holds something, volunteer or not.

    Raises: ValueError: fewer volunteers than seats, or seats that are not the
        blocks of ranks that the snapshot's positions had.
    """
    by_node = {volunteer.node: volunteer for volunteer in volunteers}
    places = [_place(choice, seat) for seat in seats]
    candidates = [
        Candidate(v.node, v.domain, tuple(_price(place, v.node).moved_bytes for place in places), v.doubtful)
        for v in volunteers
    ]
    chosen = assign(seats, candidates)
    members = tuple(
        Member(v.node, v.domain, seat.ranks, v.control_address, v.bulk_address)
        for v, seat in zip((by_node[node] for node in chosen), seats, strict=True)
    )
    orders = tuple(
        _order(node, place, bulk_addresses)
        for node, place in zip(chosen, places, strict=True)
        if place is not None
    )
    start = choice.snapshot if isinstance(choice, Choice) else Snapshot()
    first = by_node[chosen[0]]
    return Plan(
        roster=Roster(generation, members, parity, start),
        orders=orders,
        master_host=first.rendezvous_host,
        master_port=first.rendezvous_port,
        rung=steepest(order.rung for order in orders),
        reasons=_reasons(seats, chosen) + choice.refusals,
    )


def seats_of(
    choice: Choice | Fresh, roster: Roster | None, nodes: int, ranks_per_node: int
) -> tuple[Seat, ...]:
    """The seats of a job in rank order: the snapshot's blocks of ranks, or new blocks for a fresh start.

    Args:
        roster: the last one; it tells who holds a seat now.
    """
    if isinstance(choice, Choice):
        blocks = [position.ranks for state in choice.groups for position in state.positions]
    elif roster is not None:
        blocks = [member.ranks for member in roster.members]
    else:
        blocks = [tuple(range(i * ranks_per_node, (i + 1) * ranks_per_node)) for i in range(nodes)]
    holders = {member.ranks: member.node for member in roster.members} if roster is not None else {}
    return tuple(Seat(ranks, holders.get(ranks, "")) for ranks in sorted(blocks))


def _place(choice: Choice | Fresh, seat: Seat) -> tuple[GroupState, Position] | None:
    if isinstance(choice, Fresh):
        return None
    for state in choice.groups:
        for position in state.positions:
            if set(position.ranks) == set(seat.ranks):
                return state, position
    raise ValueError(f"no position of the snapshot has exactly the ranks {_span(seat.ranks)}")


def _price(place: tuple[GroupState, Position] | None, node: str) -> Price:
    return Price(Rung.NONE, 0) if place is None else price(place[0], place[1], node)


def _order(node: str, place: tuple[GroupState, Position], bulk_addresses: dict[str, str]) -> TransferOrder:
    state, position = place
    cost = price(state, position, node)
    local = cost.rung == Rung.OWN_MEMORY
    sources = tuple(
        Source(holder, bulk_addresses[holder], p.name) for p in state.positions for holder in _holders(p)
    )
    return TransferOrder(
        node=node,
        rung=cost.rung,
        positions=() if local else (position.name,),
        sources=() if local else sources,
        group=state.group,
        parity=state.parity,
        moved_bytes=cost.moved_bytes,
    )


def _holders(position: Position) -> tuple[str, ...]:
    """Who stands for this position: one node that holds all of it, or else one for each part."""
    if whole := sorted(set(position.images) & set(position.parities)):
        return (whole[0],)
    return tuple(dict.fromkeys((*position.images[:1], *position.parities[:1])))


def _reasons(seats: Sequence[Seat], chosen: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        f"{node} takes ranks {_span(seat.ranks)} of {seat.incumbent}"
        for node, seat in zip(chosen, seats, strict=True)
        if seat.incumbent and node != seat.incumbent
    )


def _span(ranks: Sequence[int]) -> str:
    contiguous = len(ranks) > 1 and list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]}-{ranks[-1]}" if contiguous else ",".join(map(str, ranks))
