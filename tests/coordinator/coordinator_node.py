"""One simulated machine: daemon, launcher, trainers and memory, driven by directives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ckptd.coordinator.effects import (
    Directive,
    JobDirective,
)
from ckptd.coordinator.events import (
    JobFacts,
    NodeReport,
    Spec,
    TrainerFact,
    TrainerState,
    TransferFact,
    TransferState,
)
from ckptd.erasure.groups import cut
from ckptd.erasure.stripe import Geometry
from ckptd.memory.inventory import HoldingFact, Roster, Snapshot
from ckptd.memory.schedule import NodeFacts, Schedule
from ckptd.recovery.plan import TransferOrder

if TYPE_CHECKING:
    from coordinator_world import World

JOB = "llama"


@dataclass
class Trainer:
    rank: int
    generation: int
    step: int
    state: TrainerState = TrainerState.ALIVE
    ready: bool = False


@dataclass
class Memory:
    """What a node remembers: on tmpfs, so it outlives the daemon and dies with the node."""

    roster: Roster | None = None
    spec: Spec | None = None
    stop_through: int = 0
    holdings: dict[Snapshot, HoldingFact] = field(default_factory=dict)


@dataclass
class Daemon:
    """The daemon's own memory: gone when it is killed."""

    incarnation: int
    sequence: int = 0
    session: int = 0
    connected: bool = False
    transfer: TransferFact | None = None
    start_seen: int = 0
    schedule: Schedule | None = None
    aborted: set[int] = field(default_factory=set)
    finished: bool = False


class SimNode:
    """One machine."""

    def __init__(self, world: World, name: str, domain: str = "") -> None:
        self.world = world
        self.name = name
        self.domain = domain
        self.up = True
        self.frozen = False
        self.mute = False  # its daemon hangs, its trainers do not
        self.epoch = 0  # grows whenever memory is lost
        self.memory = Memory()
        self.daemon: Daemon | None = None
        self.trainers: dict[int, Trainer] = {}
        self.started = 0
        self.confirmed = 0
        self.inbox_in = 0.0
        self.inbox_out = 0.0

    # What the daemon says

    @property
    def awake(self) -> bool:
        return self.up and not self.frozen

    @property
    def serving(self) -> bool:
        return self.awake and self.daemon is not None

    @property
    def generation(self) -> int:
        return self.memory.roster.generation if self.memory.roster else 0

    @property
    def ranks(self) -> tuple[int, ...]:
        member = self.memory.roster.member(self.name) if self.memory.roster else None
        return member.ranks if member is not None else ()

    def group(self) -> tuple[str, ...]:
        roster = self.memory.roster
        assert roster is not None
        for group in cut([(m.node, m.domain) for m in roster.members], roster.parity):
            if self.name in group:
                return group
        raise AssertionError("not a member")

    def stopped_through(self) -> int:
        through = self.memory.stop_through
        alive = [
            t for t in self.trainers.values() if t.state == TrainerState.ALIVE and t.generation <= through
        ]
        waits = self.confirmed < self.started <= through
        return 0 if alive or waits else through

    def living(self) -> list[Trainer]:
        return [t for t in self.trainers.values() if t.state == TrainerState.ALIVE]

    def running(self) -> int:
        mine = {t.rank for t in self.trainers.values() if t.generation == self.generation}
        return self.generation if self.ranks and set(self.ranks) <= mine else 0

    def report(self) -> NodeReport:
        d, m = self.daemon, self.memory
        assert d is not None
        d.sequence += 1
        jobs = ()
        if m.spec is not None:
            g = self.generation
            mine = [t for t in self.trainers.values() if t.generation == g]
            held = [h for h in m.holdings.values() if h.generation == g]
            facts = NodeFacts(
                node=self.name,
                generation=g,
                completed={t.rank: t.step for t in mine},
                ready=bool(self.ranks)
                and self.running() == g
                and all(t.ready and t.state == TrainerState.ALIVE for t in mine),
                folded=frozenset(h.step for h in held if h.folded),
                begun=frozenset(h.step for h in held),
                aborted=frozenset(d.aborted),
                watermark=d.schedule.watermark if d.schedule else None,
            )
            jobs = (
                JobFacts(
                    job=JOB,
                    spec=m.spec,
                    roster=m.roster,
                    facts=facts,
                    stopped_through=self.stopped_through(),
                    running_generation=self.running(),
                    trainers=tuple(
                        TrainerFact(t.rank, t.generation, t.state, t.step) for t in self.trainers.values()
                    ),
                    holdings=tuple(m.holdings.values()),
                    transfer=d.transfer,
                    finished=bool(mine)
                    and self.running() == g
                    and all(t.state == TrainerState.FINISHED for t in mine),
                ),
            )
        return NodeReport(
            self.name,
            d.incarnation,
            d.sequence,
            self.domain,
            f"{self.name}:1",
            f"{self.name}:2",
            self.name,
            9,
            jobs,
        )

    def changed(self) -> None:
        if self.serving:
            self.world.send_report(self)

    # What it is told

    def follow(self, directive: Directive) -> None:
        for wish in directive.jobs:
            self._follow(wish)

    def _follow(self, wish: JobDirective) -> None:
        m, d = self.memory, self.daemon
        assert d is not None
        if m.spec is None:
            m.spec = wish.spec
        if wish.roster is not None and wish.roster.generation < self.generation:
            self.world.stale_directives += 1
            return
        if wish.roster is not None and wish.roster.generation > self.generation:
            self.world.accepted(self, wish.roster)
            m.roster = wish.roster
            start = wish.roster.start
            m.holdings = {
                s: h
                for s, h in m.holdings.items()
                if not (s.generation < wish.roster.generation and s.step > start.step) and h.sealed
            }
            d.schedule, d.transfer = None, None
            d.aborted = set()
        if wish.stop_through > m.stop_through:
            m.stop_through = wish.stop_through
            self.world.after(self.world.short(), lambda: self.launcher_stops(wish.stop_through))
        order, generation = wish.transfer, self.generation
        if order is not None and d.transfer is None and wish.roster is not None:
            d.transfer = TransferFact(generation, TransferState.RUNNING)
            self.world.later(self, 0.05, 0.4, lambda: self.bring(order, generation))
        if wish.start is not None and wish.start.generation == generation and self.started < generation:
            self.started = generation
            self.world.later(self, 0.2, 1.5, lambda: self.launcher_starts(generation))
        if wish.schedule is not None:
            self.apply(wish.schedule)
        self.changed()

    def launcher_stops(self, through: int) -> None:
        if not self.up:
            return
        if self.frozen:  # SIGKILL works on stopped processes too, but the launcher is stopped as well
            self.world.after(0.2, lambda: self.launcher_stops(through))
            return
        for rank in [r for r, t in self.trainers.items() if t.generation <= through]:
            del self.trainers[rank]
        self.confirmed = max(self.confirmed, through)
        self.changed()

    def launcher_starts(self, generation: int) -> None:
        if not self.awake or self.memory.stop_through >= generation or self.generation != generation:
            return
        assert self.memory.roster is not None
        if not self.trainers or all(t.generation < generation for t in self.trainers.values()):
            step = self.memory.roster.start.step
            self.trainers = {r: Trainer(r, generation, step) for r in self.ranks}
            self.world.later(self, 0.05, 0.3, lambda: self.set_ready(generation))
            self.changed()

    def set_ready(self, generation: int) -> None:
        for t in self.trainers.values():
            if t.generation == generation:
                t.ready = True
        self.changed()
        self.world.try_training(generation)

    def bring(self, order: TransferOrder, generation: int) -> None:
        d, m = self.daemon, self.memory
        if (
            d is None
            or d.transfer is None
            or d.transfer.generation != generation
            or self.generation != generation
        ):
            return
        assert m.roster is not None
        start = m.roster.start
        state = TransferState.VERIFIED
        held = m.holdings.get(start)
        if order.positions:
            if self.decode(order, start):
                m.holdings[start] = HoldingFact(
                    start.generation,
                    start.step,
                    order.group,
                    order.positions[0],
                    self.ranks,
                    order.parity,
                    sealed=True,
                    node_bytes=100,
                )
            else:
                state = TransferState.FAILED
        elif held is None or not held.sealed:
            state = TransferState.FAILED
        d.transfer = replace(d.transfer, state=state, reason="sources lost", nbytes=100)
        if state == TransferState.VERIFIED:
            self.world.verified(self, start)
            again = Snapshot(generation, start.step)
            m.holdings[again] = HoldingFact(
                generation, start.step, self.group(), self.name, self.ranks, m.roster.parity, True, False, 100
            )
            self.world.try_fold(generation, start.step)
        self.changed()

    def decode(self, order: TransferOrder, start: Snapshot) -> bool:
        """Whether the sources named really hold, now, enough to rebuild the position."""
        images, parities = set(), set()
        for source in order.sources:
            node = self.world.nodes[source.node]
            held = node.memory.holdings.get(start)
            if not node.serving or held is None or held.position != source.position:
                continue
            index = order.group.index(source.position)
            if held.sealed:
                images.add(index)
            if held.folded:
                parities.add(index)
        if order.group.index(order.positions[0]) in images:
            return True
        if not 1 <= order.parity < len(order.group):
            return False
        return Geometry(len(order.group), order.parity).decodable(images, parities)

    # Capture and protection

    def apply(self, schedule: Schedule) -> None:
        d, m = self.daemon, self.memory
        assert d is not None
        if schedule.generation != self.generation:
            return
        old = d.schedule.watermark if d.schedule else None
        if old is not None and (schedule.watermark is None or schedule.watermark < old):
            schedule = replace(schedule, watermark=old)
        d.schedule = schedule
        # A step that was named too late for a rank here is given up.
        for t in self.trainers.values():
            if t.generation != self.generation or t.state != TrainerState.ALIVE:
                continue
            for step in schedule.due:
                if step <= t.step and Snapshot(self.generation, step) not in m.holdings:
                    d.aborted.add(step)
                    self.world.late_names += 1
        for s in list(m.holdings):
            g, w = self.generation, schedule.watermark
            mine = s.generation == g
            given_up = mine and (s.step in schedule.aborted or s.step in d.aborted)
            if (mine and w is not None and s.step < w) or given_up or (s.generation < g and w is not None):
                del m.holdings[s]

    def completed(self, step: int) -> None:
        """All ranks here completed this step."""
        for t in self.trainers.values():
            t.step = step
        d, m = self.daemon, self.memory
        g = self.generation
        if d is not None and d.schedule is not None and step in d.schedule.due:
            assert m.roster is not None and m.spec is not None
            used = {s.step for s in m.holdings}
            if len(used) < m.spec.slots:
                m.holdings[Snapshot(g, step)] = HoldingFact(
                    g, step, self.group(), self.name, self.ranks, m.roster.parity
                )
                self.world.later(self, 0.005, 0.05, lambda: self.seal(g, step))
            else:
                d.aborted.add(step)
                self.world.no_slots += 1
        self.changed()

    def seal(self, generation: int, step: int) -> None:
        held = self.memory.holdings.get(Snapshot(generation, step))
        if held is None or generation != self.generation or self.daemon is None:
            return
        self.memory.holdings[Snapshot(generation, step)] = replace(held, sealed=True, node_bytes=100)
        self.changed()
        self.world.try_fold(generation, step)

    def fold(self, generation: int, step: int) -> None:
        held = self.memory.holdings.get(Snapshot(generation, step))
        if held is None or generation != self.generation or self.daemon is None or not held.sealed:
            return
        self.memory.holdings[Snapshot(generation, step)] = replace(held, folded=True)
        self.world.folded.setdefault(Snapshot(generation, step), {})[self.name] = self.epoch
        self.changed()
