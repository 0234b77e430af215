"""One node of a job as a small machine over the product's own rules, for a search through interleavings.

What a node holds is a tuple that can be hashed.  For every action it is thawed into real
`Holding`s, the product's rules are asked, and the result is frozen again; answers are
remembered, because a search asks the same thing very often.  The model adds no rule of its
own but the order in which things can happen at all: see each method's docstring.

A node stands at index 0 of its group here and names its peers by their distance: the geometry
looks the same from every node.  Slots have no names: only how many are free can matter.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ckptd.erasure.groups import cut
from ckptd.erasure.stripe import Geometry
from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES
from ckptd.memory.arena import Arena
from ckptd.memory.holding import Holding, Parity, Place, free_slots, releasable
from ckptd.memory.inventory import HoldingFact, Member, Roster
from ckptd.memory.schedule import NodeFacts, facts_of
from ckptd.v1 import bulk_pb2, common_pb2, coordinator_pb2

JOB = "job"
GENERATION = 1


class Fault(enum.Enum):
    """What the model does wrong on purpose; the product's rules stay what they are."""

    NONE = "nothing"
    SINGLE_PARITY = "there is one place for parity, and the next step's overwrites it"
    RELEASE_ON_SEAL = "a slot is freed when a newer image is sealed here"
    RELEASE_BY_GROUP = "a slot is freed when the own group, not the job, has folded a newer step"
    FOLD_IN_PLACE = "a step is folded into the parity of the step before it"


@dataclass(frozen=True)
class Bounds:
    """How much of the world is searched.

    Args:
        nodes: per group.
        parity: m.
        steps: 1..steps are captured.
        aborts: any node may give up any step that it did not fold, or of which it has only damage.
        restarts: how many daemons start anew and adopt what verifies.
        takeovers: how many coordinators start anew with nothing remembered.
        reorder: schedules arrive in any order, older ones after newer ones too.
        eager: a seal record or contribution that a node can take for an image it holds is taken before
            anything else happens.  Recovery cannot see either, and neither forbids anything: whatever
            can happen without it can happen with it.
        exact: every permutation of the nodes and every stale report is a state of its own.
    """

    groups: int = 2
    nodes: int = 2
    parity: int = 1
    slots: int = 2
    steps: int = 4
    aborts: bool = False
    restarts: int = 0
    takeovers: int = 0
    reorder: bool = False
    eager: bool = False
    exact: bool = False
    fault: Fault = Fault.NONE

    def __post_init__(self) -> None:
        # A daemon or a coordinator that forgot where it was may see anything again.
        assert self.reorder or not (self.restarts or self.takeovers)
        # Damage is found where a contribution is lacking, and a new daemon keeps records but not
        # contributions; a fault may let them overwrite what recovery sees.
        assert not self.eager or not (self.aborts or self.restarts or self.fault is not Fault.NONE)


class Phase(enum.IntEnum):
    """How far a node's own image of a step is."""

    ABSENT = 0
    CAPTURED = 1
    SEALED = 2


class Held(NamedTuple):
    """A holding, frozen.  Peers are bits, 1 << distance, in the order of the group."""

    step: int
    phase: Phase = Phase.ABSENT
    seals: int = 0
    parts: int = 0  # contributions that are folded in
    parity: bool = False
    folded: bool = False


class Wire(NamedTuple):
    """A schedule as a node knows it."""

    watermark: int | None = None
    due: tuple[int, ...] = ()
    aborted: tuple[int, ...] = ()


class Node(NamedTuple):
    """One node: the schedule it knows, its trainer's newest completed step, and what it holds."""

    known: Wire = Wire()
    completed: int = 0
    aborted: tuple[int, ...] = ()
    held: tuple[Held, ...] = ()

    def at(self, step: int) -> Held | None:
        return next((held for held in self.held if held.step == step), None)

    def done(self, peer: Node) -> int:
        """The newest step that this node or that peer knows to be protected."""
        return max(self.known.watermark or 0, peer.known.watermark or 0)


Holdings = dict[tuple[int, int], Holding]
Outcome = tuple[str, Node]


class Nodes:
    """What a node can do, and what can be seen of it.

    Args:
        directory: where one small arena lies until `close`.
    """

    def __init__(self, bounds: Bounds, directory: Path) -> None:
        self.bounds = bounds
        # One node of every group per rack: this is what makes `cut` deal so many groups.
        names = [(f"{'abc'[g]}{i}", f"rack-{i}") for i in range(bounds.nodes) for g in range(bounds.groups)]
        members = tuple(Member(name, domain, (rank,)) for rank, (name, domain) in enumerate(names))
        self.roster = Roster(GENERATION, members, bounds.parity)
        self.groups = cut(names, bounds.parity)
        assert [len(group) for group in self.groups] == [bounds.nodes] * bounds.groups
        self._arena = Arena.create(directory, "rank-00000", bytes(16), bounds.slots, CELL_BYTES)
        geometry = Geometry(bounds.nodes, bounds.parity)
        stripes = [geometry.parity_stripe(0, p) for p in range(bounds.parity)]
        # The peers whose data this node folds, as bits, and all of them.
        self.sources = 0
        for stripe in stripes:
            for symbol in range(geometry.data_chunks):
                self.sources |= 1 << geometry.data_source(stripe, symbol)[0]
        self.peers = (1 << bounds.nodes) - 2
        self.alone = functools.cache(self._alone)
        self.from_peer = functools.cache(self._from_peer)
        self.urgent = functools.cache(self._urgent)
        self.damaged = functools.cache(self._damaged)
        self.learn = functools.cache(self._learn)
        self.released = functools.cache(self._released)
        self.facts = functools.cache(self._facts)

    def close(self) -> None:
        self._arena.discard()

    # By itself

    def _alone(self, node: Node) -> list[Outcome]:
        """What a node can do by itself: capture, seal, finish a fold, give a step up."""
        out = []
        held = self._thaw(node)
        step = self._capturable(node, held)
        if step is not None:
            holding = held.get((GENERATION, step)) or self._new_holding(held, step)
            holding.places[0] = self._free_place(held)
            out.append((f"captures {step}", self._freeze(held, node)._replace(completed=step)))
        for old in node.held:
            held = self._thaw(node)
            if old.phase is Phase.CAPTURED:
                assert held[GENERATION, old.step].seal_rank(_rank_seal(), JOB)
                sealed = self._freeze(held, node)
                if self.bounds.fault is Fault.RELEASE_ON_SEAL:
                    sealed = self.released(sealed, old.step)
                out.append((f"seals {old.step}", sealed))
            elif old.parts == self.sources and not old.folded:
                held[GENERATION, old.step].folded = True
                out.append((f"has folded {old.step}", self._freeze(held, node)))
        if self.bounds.aborts:
            out += [(f"gives up {step}", self.give_up(node, step)) for step in self._abortable(node)]
        return out

    def _capturable(self, node: Node, held: Holdings) -> int | None:
        """The step that the trainer captures next: due, in its future, and given a free slot.

        Slots are granted to due steps in their order, so a later one gets none before an earlier.
        """
        taken = {holding.step for holding in held.values() if holding.places}
        wanted = [step for step in node.known.due if step > node.completed and step not in taken]
        if not wanted or wanted[0] > self.bounds.steps:
            return None
        return wanted[0] if free_slots(self._arena, held.values(), ()) else None

    def _abortable(self, node: Node) -> list[int]:
        """As `Job.abort` has it: newer than the watermark, and not reported as folded."""
        steps = {*node.known.due, *(held.step for held in node.held)} - set(node.aborted)
        folded = {held.step for held in node.held if held.folded}
        return sorted(s for s in steps - folded if (node.known.watermark or 0) < s <= self.bounds.steps)

    def give_up(self, node: Node, step: int) -> Node:
        """The node after it gave a step up; its trainer has run past that step, or does so now."""
        held = tuple(held for held in node.held if held.step != step)
        aborted = tuple(sorted({*node.aborted, step}))
        return node._replace(completed=max(node.completed, step), aborted=aborted, held=held)

    def restarted(self, node: Node) -> Node:
        """A new daemon adopts what verifies: sealed images, seal records, parity that was folded."""
        held = []
        for old in node.held:
            if old.phase is Phase.CAPTURED:
                old = old._replace(phase=Phase.ABSENT)
            if not old.folded:
                old = old._replace(parts=0, parity=False)
            if old.phase is Phase.SEALED or old.seals:
                held.append(old)
        return Node(completed=node.completed, held=tuple(held))

    # Between two nodes of a group

    def _from_peer(self, node: Node, peer: Node, distance: int) -> list[Outcome]:
        """What can come in from the peer at this distance: a seal record, a contribution.

        A record is sent once the image is sealed; data once both ends have all the group's
        records.  Neither is sent or taken of a step that is known to be protected, and
        nothing is taken of one that was given up.
        """
        out = []
        refused = {*node.aborted, *node.known.aborted}
        for sent in peer.held:
            if sent.phase is not Phase.SEALED or sent.step <= node.done(peer) or sent.step in refused:
                continue
            held = self._thaw(node)
            holding = held.get((GENERATION, sent.step)) or self._new_holding(held, sent.step)
            name = holding.group[distance]
            if name not in holding.seals:
                holding.seals[name] = _seal_record(name, sent.step)
                out.append((f"gets the seal of {sent.step} from", self._freeze(held, node)))
            elif set(holding.seals) == set(holding.group) and sent.seals == self.peers:
                old, bit = node.at(sent.step), 1 << distance & self.sources
                assert old is not None
                if bit & ~old.parts and not old.folded and self._place_parity(held, holding):
                    now = self._freeze(held, node, {sent.step: old.parts | bit})
                    out.append((f"folds {sent.step} of", now))
        return out

    def _urgent(self, node: Node, peer: Node, distance: int) -> Outcome | None:
        """What is taken before anything else happens; see `Bounds.eager`."""
        captured = [held.step for held in node.held if held.phase is not Phase.ABSENT]
        eager = {
            f"{what} {step} {of}"
            for step in captured
            for what, of in (("gets the seal of", "from"), ("folds", "of"))
        }
        return next((found for found in self.from_peer(node, peer, distance) if found[0] in eager), None)

    def _place_parity(self, held: Holdings, holding: Holding) -> bool:
        """Gives a holding a place for its parity where it has none; False while none is free."""
        if holding.parity is not None:
            return True
        others = [h for h in held.values() if h.parity is not None]
        victim = None
        if self.bounds.fault is Fault.SINGLE_PARITY:
            victim = max(others, key=lambda h: h.step, default=None)
        elif self.bounds.fault is Fault.FOLD_IN_PLACE:
            older = (h for h in others if h.step < holding.step)
            victim = max(older, key=lambda h: h.step, default=None)
        if victim is not None:
            victim.parity, victim.folded = None, False
        elif len(others) >= self.bounds.slots:
            return False
        holding.parity = Parity(0, 0, [])
        return True

    def _damaged(self, node: Node, peer: Node, distance: int) -> list[Outcome]:
        """Steps folded here and given up, because what this node has to send of them is damaged.

        As `Job.give_up` has it: the peer still lacks the contribution, so nobody can count on the step.
        """
        bit = 1 << (self.bounds.nodes - distance) & self.sources
        out = []
        for held in node.held:
            theirs = peer.at(held.step)
            lacks = bit and not (theirs is not None and theirs.parts & bit)
            if held.folded and lacks and held.step > node.done(peer) and held.step not in node.aborted:
                out.append((f"has {held.step} damaged, not to be sent to", self.give_up(node, held.step)))
        return out

    # What is told

    def _learn(self, node: Node, news: Wire) -> Node:
        """As `Job.apply`: takes over a schedule but for an older watermark, and frees what it allows."""
        marks = [mark for mark in (node.known.watermark, news.watermark) if mark is not None]
        known = news._replace(watermark=max(marks, default=None))
        return self.released(node._replace(known=known), known.watermark)

    def _released(self, node: Node, watermark: int | None) -> Node:
        """The node after it freed what the product's one rule allows with this watermark."""
        held = self._thaw(node)
        for key in releasable(held, GENERATION, watermark, {*node.aborted, *node.known.aborted}):
            del held[key]
        aborted = tuple(step for step in node.aborted if watermark is None or step > watermark)
        return self._freeze(held, node)._replace(aborted=aborted)

    def _facts(self, node: Node) -> NodeFacts:
        """What the coordinator gets from this node's report."""
        me = self.roster.members[0]
        report = coordinator_pb2.JobReport(
            job=JOB,
            generation=GENERATION,
            roster=common_pb2.Roster(members=[common_pb2.Member(node=me.node, ranks=me.ranks)]),
            trainers=[
                coordinator_pb2.Trainer(
                    rank=0,
                    generation=GENERATION,
                    state=coordinator_pb2.Trainer.ALIVE,
                    step=node.completed,
                    ready=True,
                )
            ],
            holdings=[holding.report() for holding in self._thaw(node).values()],
            watermark=node.known.watermark or 0,
            has_watermark=node.known.watermark is not None,
            aborted=node.aborted,
        )
        return facts_of(me.node, report)

    def inventory(self, held: Iterable[Held], group: int, index: int) -> list[HoldingFact]:
        """What recovery sees of a node with these holdings at this place of the roster."""
        members = self.groups[group]
        member = self.roster.member(members[index])
        assert member is not None
        out = []
        for holding in self._thaw(Node(held=tuple(held))).values():
            told = holding.report()
            out.append(
                HoldingFact(
                    generation=told.generation,
                    step=told.step,
                    group=members,
                    position=member.node,
                    ranks=member.ranks,
                    parity=told.parity,
                    sealed=told.sealed,
                    folded=told.folded,
                    node_bytes=told.node_bytes,
                )
            )
        return out

    # Between tuples and the real thing

    def _new_holding(self, held: Holdings, step: int) -> Holding:
        group = self.groups[0]
        holding = Holding(GENERATION, step, group, group[0], self.bounds.parity, (0,))
        held[holding.key] = holding
        return holding

    def _free_place(self, held: Holdings) -> Place:
        slot = free_slots(self._arena, held.values(), ())[0]
        taken = {place.slot for holding in held.values() for place in holding.places.values()}
        assert slot not in taken, f"slot {slot} holds an image"
        return Place(self._arena, slot, CELL_BYTES)

    def _thaw(self, node: Node) -> Holdings:
        held: Holdings = {}
        for old in node.held:
            holding = self._new_holding(held, old.step)
            if old.phase is not Phase.ABSENT:
                holding.places[0] = self._free_place(held)
            if old.phase is Phase.SEALED:
                holding.seal_rank(_rank_seal(), JOB)
            for distance, name in enumerate(holding.group):
                if old.seals >> distance & 1:
                    holding.seals[name] = _seal_record(name, old.step)
            holding.parity = Parity(0, 0, []) if old.parity else None
            holding.folded = old.folded
        return held

    def _freeze(self, held: Holdings, node: Node, parts: Mapping[int, int] | None = None) -> Node:
        """`node` with what is held now; contributions stay where the parity is still that step's."""
        before = {old.step: old.parts for old in node.held} | dict(parts or {})
        frozen = []
        for holding in sorted(held.values(), key=lambda h: h.step):
            phase = Phase.SEALED if holding.sealed else Phase.CAPTURED if holding.places else Phase.ABSENT
            seals = sum(1 << d for d, name in enumerate(holding.group) if d and name in holding.seals)
            parity = holding.parity is not None
            held_parts = before.get(holding.step, 0) if parity else 0
            frozen.append(Held(holding.step, phase, seals, held_parts, parity, holding.folded))
        return node._replace(held=tuple(frozen))


def _rank_seal() -> bulk_pb2.RankSeal:
    return bulk_pb2.RankSeal(
        rank=0, image_bytes=CELL_BYTES, plan_hash=bytes(16), cell_digests=bytes(DIGEST_BYTES)
    )


@functools.cache
def _seal_record(name: str, step: int) -> bulk_pb2.SealRecord:
    return bulk_pb2.SealRecord(
        job=JOB, generation=GENERATION, step=step, node=name, ranks=[_rank_seal()], cell_bytes=CELL_BYTES
    )
