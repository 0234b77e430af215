"""A small world for the coordinator's machine: simulated nodes, network, launcher and clock.

The machine, the schedule, the inventory, the planner and the geometry are the real
ones.  Everything random comes from one seed.  Training is lockstep: a step completes
on all ranks or on none, and ranks whose peer died die a moment later.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import random
from collections.abc import Callable

from coordinator_node import JOB, Daemon, Memory, SimNode, Trainer
from coordinator_oracle import Oracle

from ckptd.coordinator import machine
from ckptd.coordinator.effects import (
    Announce,
    AskStore,
    CommitEntry,
    Entry,
    Probe,
    Record,
    Send,
)
from ckptd.coordinator.events import (
    Answer,
    Disconnected,
    Event,
    NodeReport,
    Probed,
    Reported,
    Spec,
    Stored,
    Submitted,
    Tick,
    TrainerState,
)
from ckptd.coordinator.state import State, Timing
from ckptd.memory.inventory import Roster, Snapshot
from ckptd.memory.schedule import next_schedule
from ckptd.recovery.ladder import Rung


class World(Oracle):
    """Clock, network and coordinator."""

    def __init__(
        self, seed: int, spec: Spec, spares: int, *, step_s: float = 0.15, total: int = 10**9
    ) -> None:
        super().__init__()
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
        self.stored: Snapshot | None = None  # the newest checkpoint in the store
        self.asked_store = 0
        self.stale_directives = self.late_names = self.no_slots = self.empty_restarts = 0
        self.trouble = 0.0  # probability that a stream is cut, for each report
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
        # A journal and all memory lost together: then nobody knows that there was anything.
        somebody_knows = any(node.serving and node.memory.roster for node in self.nodes.values())
        if not self.keep_journal and (somebody_knows or not self.rosters):
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
                case AskStore():
                    self.asked_store += 1
                    if self.stored is not None:
                        answer = Stored(self.now, effect.job, self.stored)
                        self.after(0.2, functools.partial(self.feed, answer))
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
            if entry.plan.rung == Rung.STORAGE:
                assert self.stored is not None and self.losses() > roster.parity, "memory goes before storage"
                self.protected, self.protected_steps = None, []
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

    def job(self) -> object:
        assert self.state is not None
        return self.state.jobs.get(JOB)
