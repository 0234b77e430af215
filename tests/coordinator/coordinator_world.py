"""A small world for the coordinator's machine: simulated nodes, network, launcher and clock.

The machine, the schedule, the inventory, the planner and the geometry are the real
ones.  Everything random comes from one seed.  Training is lockstep: a step completes
on all ranks or on none, and ranks whose peer died die a moment later.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ckptd.coordinator import machine
from ckptd.coordinator.effects import (
    Announce,
    CommitEntry,
    Directive,
    Entry,
    JobDirective,
    Probe,
    Record,
    Send,
)
from ckptd.coordinator.events import (
    Answer,
    Disconnected,
    Event,
    JobFacts,
    NodeReport,
    Probed,
    Reported,
    Spec,
    Submitted,
    Tick,
    TrainerFact,
    TrainerState,
    TransferFact,
    TransferState,
)
from ckptd.coordinator.state import State, Timing
from ckptd.erasure.groups import cut
from ckptd.erasure.stripe import Geometry
from ckptd.memory.inventory import HoldingFact, Roster, Snapshot
from ckptd.memory.schedule import NodeFacts, Schedule, next_schedule
from ckptd.recovery.plan import TransferOrder

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


class World:
    """Clock, network, coordinator, and the oracle that knows the truth."""

    def __init__(
        self, seed: int, spec: Spec, spares: int, *, step_s: float = 0.15, total: int = 10**9
    ) -> None:
        self.random = random.Random(seed)
        self.spec = spec
        self.step_s = step_s
        self.total = total
        self.now = 100.0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.numbers = itertools.count(1)
        self.nodes = {f"n{i}": SimNode(self, f"n{i}") for i in range(spec.nodes + spares)}
        self.timing = Timing()
        self.journal: list[Entry] = []
        self.keep_journal = True
        self.state: State | None = None
        self.held_until = 0.0  # the coordinator's process gets no time until then
        self.pauses = 0.002  # probability that the coordinator is held up, for each tick
        self.life = 0
        self.pending: list[tuple[int, NodeReport]] = []
        self.events: list[Announce] = []
        self.stale_directives = self.late_names = self.no_slots = self.empty_restarts = 0
        self.trouble = 0.0  # probability that a stream is cut, for each report
        # The oracle.
        self.rosters: dict[int, Roster] = {}
        # Which memory of a node (by its epoch) folded a step.
        self.folded: dict[Snapshot, dict[str, int]] = {}
        self.protected: tuple[Snapshot, dict[str, int]] | None = None
        self.protected_steps: list[tuple[float, int]] = []
        self.training_generation = 0
        self.steps_done: list[tuple[float, int, int]] = []

    # Time

    def at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (when, next(self.order), act))

    def after(self, delay: float, act: Callable[[], None]) -> None:
        self.at(self.now + delay, act)

    def short(self) -> float:
        return self.random.uniform(0.001, 0.03)

    def later(self, node: SimNode, low: float, high: float, act: Callable[[], None]) -> None:
        """Acts on this node after a while, unless it died; while it is frozen the time waits."""
        epoch = node.epoch

        def when_awake() -> None:
            if node.frozen:
                self.after(0.1, when_awake)
            elif node.up and node.epoch == epoch:
                act()

        self.after(self.random.uniform(low, high), when_awake)

    def run_until(self, when: float, done: Callable[[], bool] | None = None) -> bool:
        while self.queue and self.queue[0][0] <= when:
            self.now, _, act = heapq.heappop(self.queue)
            act()
            if done is not None and done():
                return True
        self.now = max(self.now, when)
        return False

    def run_for(self, seconds: float, done: Callable[[], bool] | None = None) -> bool:
        return self.run_until(self.now + seconds, done)

    # The coordinator

    def start_coordinator(self, *, submit: bool = True) -> None:
        if not self.keep_journal:
            self.journal = []
            self.empty_restarts += 1
            self.keep_journal = True
        self.life += 1
        self.state = machine.restore(self.journal, self.timing)
        self.pending = []
        self.tick(self.life)
        if submit and machine.check_submission(self.state, self.spec):
            self.feed(Submitted(self.now, self.spec))
        for node in self.nodes.values():
            if node.daemon is not None:
                self.after(self.random.uniform(0.05, 0.5), lambda node=node: self.connect(node))

    def kill_coordinator(self) -> None:
        self.state = None
        self.life += 1
        for node in self.nodes.values():
            if node.daemon is not None:
                node.daemon.connected = False

    def tick(self, life: int) -> None:
        if self.state is None or life != self.life:
            return
        if self.now < self.held_until:
            # Whatever waits for it, time is what it notices first.
            self.at(self.held_until, lambda: (self.feed(Tick(self.now)), self.tick(life)))
            return
        self.flush()
        self.feed(Tick(self.now))
        pause = self.timing.tick_s * self.random.uniform(1.0, 1.4)
        if self.random.random() < self.pauses:
            self.held_until = self.now + self.random.uniform(0.2, 2.5)
        self.after(pause, lambda: self.tick(life))

    def flush(self) -> None:
        if self.pending and self.state is not None and self.now >= self.held_until:
            reports, self.pending = tuple(self.pending), []
            self.feed(Reported(self.now, reports))

    def feed(self, event: Event) -> None:
        if self.state is None:
            return
        self.state, effects = machine.step(self.state, event)
        life = self.life
        for effect in effects:
            if self.life != life:
                return
            match effect:
                case Record():
                    self.record(effect.entry)
                case Send():
                    self.send_directive(effect)
                case Probe():
                    self.probe(effect)
                case Announce():
                    self.events.append(effect)
                    if effect.name == "protected":
                        self.now_protected(Snapshot(effect.generation, effect.step))

    def record(self, entry: Entry) -> None:
        self.journal.append(entry)
        if isinstance(entry, CommitEntry):
            roster = entry.plan.roster
            if roster.generation in self.rosters:
                assert self.rosters[roster.generation] == roster, "one roster per generation"
                return
            assert roster.generation > max(self.rosters, default=0), "generations only grow"
            self.rosters[roster.generation] = roster
            self.check_start(roster)

    def send_directive(self, effect: Send) -> None:
        node = self.nodes[effect.node]
        if node.daemon is None or not node.daemon.connected:
            return
        session, life = node.daemon.session, self.life

        def arrive() -> None:
            if node.frozen:
                self.after(0.1, arrive)
                return
            d = node.daemon
            if node.up and d is not None and d.connected and d.session == session and self.life == life:
                node.follow(effect.directive)

        node.inbox_out = max(node.inbox_out, self.now + self.short())
        self.at(node.inbox_out, arrive)

    def probe(self, effect: Probe) -> None:
        node, life = self.nodes[effect.node], self.life
        answer, delay = Answer.ANSWERED, self.short()
        if not node.up or (node.daemon is None and not node.frozen):
            answer = Answer.REFUSED
        elif node.frozen or node.mute:
            answer, delay = Answer.SILENT, 0.2

        def arrive() -> None:
            if self.life == life:
                self.feed(Probed(self.now, effect.node, effect.number, answer))

        self.after(delay, arrive)

    # The network

    def connect(self, node: SimNode) -> None:
        d = node.daemon
        if d is None or not node.awake or d.connected:
            return
        if self.state is None:
            return  # it is told when a coordinator comes back
        d.session, d.connected = next(self.numbers), True
        self.send_report(node)

    def send_report(self, node: SimNode) -> None:
        d = node.daemon
        if d is None or not d.connected or self.state is None or not node.awake or node.mute:
            return
        report, session, life = node.report(), d.session, self.life
        if self.random.random() < self.trouble:
            self.cut(node)
            return  # lost

        def arrive() -> None:
            if self.life == life and self.state is not None:
                self.pending.append((session, report))
                if self.random.random() < 0.7:
                    self.flush()

        node.inbox_in = max(node.inbox_in, self.now + self.short())
        self.at(node.inbox_in, arrive)
        if self.random.random() < 0.01:
            self.after(self.random.uniform(0.0, 1.0), arrive)  # repeated, and late

    def cut(self, node: SimNode) -> None:
        """The stream breaks; the daemon makes a new one soon."""
        d = node.daemon
        if d is None or not d.connected:
            return
        d.connected = False
        session, life = d.session, self.life
        self.after(self.short(), lambda: self.end_stream(node.name, session, life))
        self.after(self.random.uniform(0.05, 0.4), lambda: self.connect(node))

    def end_stream(self, name: str, session: int, life: int) -> None:
        if self.life == life and self.state is not None:
            self.flush()
            self.feed(Disconnected(self.now, name, session))

    def heartbeat(self, node: SimNode, incarnation: int) -> None:
        if node.daemon is None or node.daemon.incarnation != incarnation:
            return
        if node.awake:
            if not node.daemon.connected:
                self.connect(node)
            self.send_report(node)
            self.stand_in(node)
        self.after(0.1 * self.random.uniform(0.9, 1.5), lambda: self.heartbeat(node, incarnation))

    def stand_in(self, node: SimNode) -> None:
        """Without a coordinator the lowest reachable daemon names the steps."""
        if self.state is not None or node.memory.roster is None:
            return
        members = [self.nodes[m] for m in node.memory.roster.nodes]
        lowest = next((m for m in members if m.serving), None)
        if lowest is not node or node.daemon is None:
            return
        there = [m for m in members if m.serving and m.generation == node.generation]
        facts = [m.report().jobs[0].facts for m in there]
        roster = node.memory.roster
        schedule = next_schedule(
            node.daemon.schedule,
            generation=roster.generation,
            start_step=roster.start.step,
            members=roster.nodes,
            facts=facts,
            every=self.spec.every,
            slots=self.spec.slots,
        )
        if schedule.watermark is not None:
            self.now_protected(Snapshot(schedule.generation, schedule.watermark))
        for m in there:
            m.apply(schedule)

    # Nodes

    def start_node(self, node: SimNode) -> None:
        node.up, node.frozen = True, False
        self.start_daemon(node)

    def start_daemon(self, node: SimNode) -> None:
        if not node.up or node.daemon is not None:
            return
        node.daemon = Daemon(next(self.numbers))
        # Adopts what verifies: unsealed images and half-folded parity are thrown away.
        node.memory.holdings = {s: h for s, h in node.memory.holdings.items() if h.sealed}
        for snapshot in node.memory.holdings:
            self.try_fold(snapshot.generation, snapshot.step)  # peers send what is missing again
        self.connect(node)
        self.heartbeat(node, node.daemon.incarnation)

    def kill_daemon(self, node: SimNode) -> None:
        if node.daemon is None:
            return
        d, node.daemon = node.daemon, None
        if d.connected:
            session, life = d.session, self.life
            self.after(self.short(), lambda: self.end_stream(node.name, session, life))

    def kill_node(self, node: SimNode) -> None:
        if not node.up:
            return
        self.kill_daemon(node)
        node.up, node.frozen = False, False
        node.epoch += 1
        node.memory = Memory()
        node.started = node.confirmed = 0
        died = {t.generation for t in node.trainers.values() if t.state == TrainerState.ALIVE}
        node.trainers = {}
        for generation in died:
            self.peers_die(generation)

    def kill_rank(self, node: SimNode) -> None:
        for t in node.trainers.values():
            if t.state == TrainerState.ALIVE:
                t.state = TrainerState.DIED
                node.changed()
                self.peers_die(t.generation)
                return

    def peers_die(self, generation: int) -> None:
        """Collectives fail: all other ranks of this generation end by themselves, a little later."""
        for node in self.nodes.values():
            for t in list(node.trainers.values()):
                if t.generation == generation and t.state == TrainerState.ALIVE and t.ready:
                    self.later(node, 0.02, 0.4, lambda node=node, t=t: self._dies(node, t))

    def _dies(self, node: SimNode, trainer: Trainer) -> None:
        if node.trainers.get(trainer.rank) is trainer and trainer.state == TrainerState.ALIVE:
            trainer.state = TrainerState.DIED
            node.changed()

    def freeze(self, node: SimNode) -> None:
        if node.up:
            node.frozen = True

    def thaw(self, node: SimNode) -> None:
        node.frozen = False
        # Whoever took part in a collective that the others gave up fails now.
        for t in node.trainers.values():
            if t.state == TrainerState.ALIVE and t.generation < self.training_generation:
                self.later(node, 0.0, 0.1, lambda t=t: self._dies(node, t))
        self.try_training(node.generation)
        node.changed()

    # Training

    def try_training(self, generation: int) -> None:
        roster = self.rosters.get(generation)
        if roster is None or self.training_generation >= generation:
            return
        if not self.together(roster):
            return
        self.training_generation = generation
        steps = {t.step for n in roster.nodes for t in self.nodes[n].trainers.values()}
        assert steps == {roster.start.step}, "all ranks resume from the same step"
        self.after(self.step_s, lambda: self.train(roster, roster.start.step + 1))

    def together(self, roster: Roster) -> bool:
        for name in roster.nodes:
            node = self.nodes[name]
            mine = [t for t in node.trainers.values() if t.generation == roster.generation]
            alive = [t for t in mine if t.state == TrainerState.ALIVE and t.ready]
            if not node.awake or len(alive) < self.spec.ranks_per_node:
                return False
        return True

    def train(self, roster: Roster, step: int) -> None:
        if self.training_generation != roster.generation:
            return
        if not self.together(roster):
            frozen = any(self.nodes[n].frozen for n in roster.nodes)
            if frozen:
                self.after(0.05, lambda: self.train(roster, step))
            return
        self.steps_done.append((self.now, roster.generation, step))
        for name in roster.nodes:
            self.later(self.nodes[name], 0.0, 0.01, lambda n=name: self._complete(n, roster.generation, step))
        if step < self.total:
            self.after(self.step_s * self.random.uniform(0.8, 1.3), lambda: self.train(roster, step + 1))

    def _complete(self, name: str, generation: int, step: int) -> None:
        node = self.nodes[name]
        if node.generation != generation or node.memory.stop_through >= generation:
            return
        node.completed(step)
        if step == self.total:
            for t in node.trainers.values():
                t.state = TrainerState.FINISHED
            node.changed()

    def try_fold(self, generation: int, step: int) -> None:
        """Once all members of a group are sealed their parity is folded, each in its time."""
        for node in self.nodes.values():
            held = node.memory.holdings.get(Snapshot(generation, step))
            if held is None or not held.sealed or held.folded or node.generation != generation:
                continue
            group = [self.nodes[n].memory.holdings.get(Snapshot(generation, step)) for n in held.group]
            if all(h is not None and h.sealed for h in group):
                self.later(node, 0.005, 0.06, lambda n=node: n.fold(generation, step))

    # The oracle

    def now_protected(self, snapshot: Snapshot) -> None:
        """Somebody told somebody that this step is protected."""
        epochs = self.folded.get(snapshot, {})
        missing = set(self.rosters[snapshot.generation].nodes) - set(epochs)
        assert not missing, f"{snapshot} was called protected, and {missing} never folded it"
        if self.protected is not None and self.protected[0].generation == snapshot.generation:
            if self.protected[0].step >= snapshot.step:
                return
        elif snapshot.generation != max(self.rosters):
            return
        self.protected_steps.append((self.now, snapshot.step))
        self.protected = (snapshot, epochs)

    def content(self, generation: int, step: int) -> Snapshot:
        """Which generation really computed the state at `step` of this generation's line."""
        while (roster := self.rosters.get(generation)) is not None and step <= roster.start.step:
            if step == 0 or roster.start.generation == 0:
                return Snapshot()
            generation = roster.start.generation
        return Snapshot(generation, step)

    def losses(self) -> int:
        """The most members that a group of the newest protected step has lost, or cannot reach now."""
        if self.protected is None:
            return 0
        snapshot, epochs = self.protected
        roster = self.rosters[snapshot.generation]
        assert self.state is not None
        lost = 0
        for group in cut([(m.node, m.domain) for m in roster.members], roster.parity):
            gone = 0
            for name in group:
                known = self.state.nodes.get(name)
                reachable = known is not None and known.alive and self.nodes[name].serving
                gone += not reachable or self.nodes[name].epoch != epochs[name]
            lost = max(lost, gone)
        return lost

    def check_start(self, roster: Roster) -> None:
        """A new generation starts from the newest protected step or later, on the same line."""
        for name in roster.nodes:
            running = {t.generation for t in self.nodes[name].living()}
            assert not running, f"{name} gets ranks while its trainers of {running} live"
        assert roster.start.step or not self.protected_steps, "never afresh once a step was protected"
        if self.protected is None:
            return
        snapshot, _ = self.protected
        if roster.start.step >= snapshot.step:
            same = self.content(roster.start.generation, snapshot.step) == self.content(*_pair(snapshot))
            assert same, f"{roster.start} is another history than {snapshot}"
        else:
            assert self.losses() > roster.parity, f"{roster.start} is older than the protected {snapshot}"
            self.protected = None

    def accepted(self, node: SimNode, roster: Roster) -> None:
        assert self.rosters[roster.generation] == roster, "every roster that is sent was committed"

    def verified(self, node: SimNode, start: Snapshot) -> None:
        held = node.memory.holdings[start]
        assert held.sealed and set(held.ranks) == set(node.ranks), "a node resumes its own ranks' images"

    def job(self) -> object:
        assert self.state is not None
        return self.state.jobs.get(JOB)


def _pair(snapshot: Snapshot) -> tuple[int, int]:
    return snapshot.generation, snapshot.step
