"""Which snapshot can be had from what living nodes hold: the pure part of recovery.

Recovery asks nobody what was decided.  It takes the holdings of reachable nodes and
resumes from the newest step for which every rank's image is sealed on a living node
or decodable from folded parity of that very (generation, step).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckptd.erasure.groups import cut
from ckptd.erasure.stripe import Geometry


@dataclass(frozen=True, order=True)
class Snapshot:
    """The place of a snapshot in the job's history; step 0 is a fresh start."""

    generation: int = 0
    step: int = 0


@dataclass(frozen=True)
class Member:
    """One node of a generation; see the wire's Member."""

    node: str
    domain: str
    ranks: tuple[int, ...]
    control_address: str = ""
    bulk_address: str = ""


@dataclass(frozen=True)
class Roster:
    """The membership of one generation; members in rank order."""

    generation: int
    members: tuple[Member, ...]
    parity: int
    start: Snapshot = Snapshot()

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        return tuple(member.node for member in self.members)

    def member(self, node: str) -> Member | None:
        return self._by_node.get(node)

    @cached_property
    def _by_node(self) -> dict[str, Member]:
        return {member.node: member for member in self.members}


@dataclass(frozen=True)
class HoldingFact:
    """What one node holds of one (generation, step); see the wire's Holding."""

    generation: int
    step: int
    group: tuple[str, ...]
    position: str
    ranks: tuple[int, ...]
    parity: int
    sealed: bool = False
    folded: bool = False
    node_bytes: int = 0


@dataclass(frozen=True)
class Position:
    """One member of an old group: its ranks, and who can give what it held."""

    name: str
    ranks: tuple[int, ...]
    # Living nodes with this position's whole image, and with its parity chunks.
    images: tuple[str, ...]
    parities: tuple[str, ...]
    node_bytes: int


@dataclass(frozen=True)
class GroupState:
    """One erasure group of the chosen snapshot; every image of it can be had."""

    positions: tuple[Position, ...]
    parity: int

    @property
    def group(self) -> tuple[str, ...]:
        return tuple(position.name for position in self.positions)

    @property
    def data_chunks(self) -> int:
        return len(self.positions) - self.parity


@dataclass(frozen=True)
class Choice:
    """The newest recoverable snapshot, and why no newer one is."""

    snapshot: Snapshot
    groups: tuple[GroupState, ...]
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fresh:
    """Nothing was ever protected: the job starts from its initial state."""

    refusals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unrecoverable:
    """Something was protected, and what is left of it does not suffice."""

    refusals: tuple[str, ...]


def newest_recoverable(
    holdings: Mapping[str, Sequence[HoldingFact]],
    world: Iterable[int],
    rosters: Mapping[int, Roster],
    *,
    ever_protected: bool,
) -> Choice | Fresh | Unrecoverable:
    """The newest snapshot of all ranks in `world` that living nodes can give back.

    Newest step first, and for equal steps the newest generation.  A later generation
    that started from step R voids every older generation's steps beyond R: they are
    another history.

    Args:
        holdings: what each living node holds.
        rosters: known memberships by generation; they tell the ranks of lost
            positions and where later generations started.
        ever_protected: somebody knows a watermark of this job; then a fresh start
            would silently lose steps and is never the answer.
    """
    ranks = frozenset(world)
    by_snapshot: dict[Snapshot, list[tuple[str, HoldingFact]]] = {}
    for node, facts in holdings.items():
        for fact in facts:
            by_snapshot.setdefault(Snapshot(fact.generation, fact.step), []).append((node, fact))
    refusals: list[str] = []
    for snapshot in sorted(by_snapshot, key=lambda s: (s.step, s.generation), reverse=True):
        where = f"step {snapshot.step} of generation {snapshot.generation}"
        if by := _voided_by(snapshot, rosters):
            refusals.append(f"{where}: void, generation {by.generation} went on from step {by.start.step}")
            continue
        found = _groups(by_snapshot[snapshot], ranks, rosters.get(snapshot.generation))
        if not isinstance(found, str):
            return Choice(snapshot, found, tuple(refusals))
        refusals.append(f"{where}: {found}")
    newest = max(rosters, default=None)
    ever_protected |= newest is not None and rosters[newest].start.step > 0
    if ever_protected or any(_perhaps_protected(held, holdings) for held in by_snapshot.values()):
        return Unrecoverable(tuple(refusals) or ("no living node holds anything of this job",))
    return Fresh(tuple(refusals))


def _voided_by(snapshot: Snapshot, rosters: Mapping[int, Roster]) -> Roster | None:
    later = (r for g, r in sorted(rosters.items()) if g > snapshot.generation)
    return next((roster for roster in later if roster.start.step < snapshot.step), None)


def _perhaps_protected(
    held: Sequence[tuple[str, HoldingFact]], holdings: Mapping[str, Sequence[HoldingFact]]
) -> bool:
    """Whether this step may have been protected before nodes were lost: no survivor of its
    generation denies it.  Then a fresh start might lose what a returning node can give."""
    generation = held[0][1].generation
    folded = {node for node, fact in held if fact.folded}
    survivors = {node for node, facts in holdings.items() if any(f.generation == generation for f in facts)}
    return bool(folded) and survivors <= folded


def _groups(
    held: Sequence[tuple[str, HoldingFact]], world: frozenset[int], roster: Roster | None
) -> tuple[GroupState, ...] | str:
    """The groups of one snapshot with all their positions, or why it cannot be had."""
    parity_of = {fact.group: fact.parity for _, fact in held}
    if roster is not None:
        # A group of which nobody lives has no holding; the roster still knows it.
        for group in cut([(m.node, m.domain) for m in roster.members], roster.parity):
            parity_of.setdefault(group, roster.parity)
    groups = []
    ranks_of = _ranks_of_positions(held, list(parity_of), world, roster)
    for group, parity in parity_of.items():
        positions = tuple(_position(name, ranks_of, group, held) for name in group)
        if why := _lacking(positions, parity):
            return f"group ({', '.join(group)}) {why}"
        if unknown := [p.name for p in positions if not p.ranks]:
            return f"the ranks of {', '.join(unknown)} are known to nobody"
        groups.append(GroupState(positions, parity))
    covered = [rank for state in groups for position in state.positions for rank in position.ranks]
    if missing := sorted(world - set(covered)):
        return f"ranks {missing} are held by nobody"
    if len(covered) != len(world) or set(covered) != world:
        return f"it holds ranks {sorted(covered)}, and the job has {sorted(world)}"
    return tuple(sorted(groups, key=lambda state: state.positions[0].ranks))


def _ranks_of_positions(
    held: Sequence[tuple[str, HoldingFact]],
    groups: Sequence[tuple[str, ...]],
    world: frozenset[int],
    roster: Roster | None,
) -> dict[str, tuple[int, ...]]:
    """Ranks by position; where one alone is unknown, it has what nobody else has."""
    ranks_of = {member.node: member.ranks for member in roster.members} if roster is not None else {}
    ranks_of.update({fact.position: fact.ranks for _, fact in held})
    unknown = [name for group in groups for name in group if name not in ranks_of]
    if len(unknown) == 1:
        ranks_of[unknown[0]] = tuple(sorted(world - {rank for ranks in ranks_of.values() for rank in ranks}))
    return ranks_of


def _position(
    name: str,
    ranks_of: Mapping[str, tuple[int, ...]],
    group: tuple[str, ...],
    held: Sequence[tuple[str, HoldingFact]],
) -> Position:
    mine = [(node, fact) for node, fact in held if fact.group == group and fact.position == name]
    return Position(
        name=name,
        ranks=ranks_of.get(name, ()),
        images=tuple(sorted(node for node, fact in mine if fact.sealed)),
        parities=tuple(sorted(node for node, fact in mine if fact.folded)),
        node_bytes=max((fact.node_bytes for _, fact in mine), default=0),
    )


def _lacking(positions: Sequence[Position], parity: int) -> str:
    """Empty if every image of the group can be had, else what is missing."""
    images = [index for index, position in enumerate(positions) if position.images]
    if len(images) == len(positions):
        return ""
    if not 1 <= parity < len(positions):
        lost = ", ".join(position.name for position in positions if not position.images)
        return f"has no parity and lost {lost}"
    parities = [index for index, position in enumerate(positions) if position.parities]
    geometry = Geometry(len(positions), parity)
    if geometry.decodable(images, parities):
        return ""
    needed = geometry.data_chunks
    for stripe in range(geometry.nodes):
        holders = set(geometry.parity_nodes(stripe))
        found = len(set(images) - holders) + len(set(parities) & holders)
        if found < needed:
            return f"has {found} of {needed} symbols of stripe {stripe}"
    raise AssertionError("not decodable, yet every stripe has enough symbols")
