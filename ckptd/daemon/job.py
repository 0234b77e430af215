"""One job on one node: membership, trainers, grants, facts.

Lives on the event loop alone, so nothing here needs a lock.  It does no protocol
and no heavy work: others call it, do what it asks, and tell it the outcome.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ckptd.daemon.frames import FrameLink
from ckptd.daemon.job_facts import record_of, report_of
from ckptd.daemon.job_memory import JobMemory
from ckptd.erasure.groups import cut, protected
from ckptd.erasure.stripe import Geometry
from ckptd.errors import InvalidRequest, StaleGeneration
from ckptd.memory import budget, records
from ckptd.memory.arena import Arena, padded
from ckptd.memory.holding import Holding, Parity, Place
from ckptd.v1 import bulk_pb2, common_pb2, coordinator_pb2, local_pb2

log = logging.getLogger("ckptd.job")

State = coordinator_pb2.Trainer


@dataclass
class Trainer:
    """One rank's trainer, as last seen."""

    rank: int
    generation: int
    pid: int
    link: FrameLink | None = None
    state: coordinator_pb2.Trainer.State = State.ALIVE
    step: int = 0
    plan_hash: bytes = b""
    image_bytes: int = 0
    exit: str = ""
    # A loss was not finite, and run.accept() has not been called.
    held: bool = False
    # Said Hello; before that it is only known from its launcher or an older record.
    attached: bool = False
    parks: bool = False
    # It said that it ends because of an error; its process may still be there.
    failing: bool = False


@dataclass
class Job:
    """State and rules; `changed` is called whenever a fact for the report changed."""

    name: str
    node: str
    directory: Path
    owner_uid: int
    changed: Callable[[], None]
    spec: coordinator_pb2.JobSpec = field(default_factory=coordinator_pb2.JobSpec)
    roster: common_pb2.Roster = field(default_factory=common_pb2.Roster)
    stop_through: int = 0
    started_generation: int = 0
    confirmed_stopped: int = 0
    start: coordinator_pb2.StartOrder | None = None
    finished: bool = False
    transfer: coordinator_pb2.Transfer = field(default_factory=coordinator_pb2.Transfer)
    schedule: common_pb2.Schedule = field(default_factory=common_pb2.Schedule)
    trainers: dict[int, Trainer] = field(default_factory=dict)
    grants: dict[int, dict[int, Place]] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    # What was promised to trainers before their arenas exist, in bytes; counts while any of them lives.
    promised_bytes: int = 0
    # Newest step of this generation whose flush has ended here, well or not.
    flush_ended: int = 0
    # Step of this generation up to which no flush is to come or under way here.
    flush_over: int = 0
    # The greatest generation that the store knows of this job, asked before the first one is made here.
    stored_generation: int = 0
    # The checkpoint that this generation's trainers loaded from the store, (generation, step).
    resumed_from: tuple[int, int] = (0, 0)
    # This node was told to end.
    leaving: bool = False
    # Steps between background flushes, as the settings ask for; 0: none.
    flush_every: int = 0
    # Images captured and not yet digested; a stop is confirmed only when there are none.
    digesting: int = 0
    unreachable: set[str] = field(default_factory=set)
    # Holdings in which somebody ran into damaged bytes: the scrub looks at them first.
    suspects: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.memory = JobMemory(self.name, self.node, self.directory)

    # Membership

    @property
    def generation(self) -> int:
        return self.roster.generation

    @property
    def slots(self) -> int:
        """Steps that are kept at the same time."""
        return max(2, self.spec.slots)

    @property
    def places(self) -> int:
        """Images that an arena has room for: a background flush holds on to one beside the slots."""
        return self.slots + self.flush_places

    @property
    def flush_places(self) -> int:
        return 1 if self.flush_every else 0

    @property
    def member(self) -> common_pb2.Member | None:
        """This node's place in the newest roster, or None when it has none."""
        return next((member for member in self.roster.members if member.node == self.node), None)

    @property
    def group(self) -> tuple[str, ...]:
        """This node's erasure group in the newest roster."""
        members = [(member.node, member.domain) for member in self.roster.members]
        for group in cut(members, self.roster.parity):
            if self.node in group:
                return group
        return (self.node,)

    def address_of(self, node: str) -> str:
        """The bulk address of a member of the newest roster."""
        return next(member.bulk_address for member in self.roster.members if member.node == node)

    def accept(self, roster: common_pb2.Roster) -> None:
        """Takes over a newer membership; from here on nothing older changes anything.

        Raises:
            StaleGeneration: a newer one was accepted before.
        """
        if roster.generation < self.generation:
            raise self.stale(roster.generation)
        if roster.generation == self.generation:
            return
        log.info(
            "job %s: generation %d, starting from step %d", self.name, roster.generation, roster.start.step
        )
        self.roster.CopyFrom(roster)
        self.schedule = common_pb2.Schedule(generation=roster.generation)
        self.transfer = coordinator_pb2.Transfer(generation=roster.generation)
        self.start = None
        self.flush_ended = self.flush_over = 0
        self.resumed_from = (roster.start.generation, roster.start.step)
        self.finished = False  # a parked job lives again
        self.aborted.clear()
        self.grants.clear()
        self.unreachable.clear()
        self.memory.void(roster.generation, roster.start.step)
        self.save()
        self.changed()

    def stale(self, generation: int) -> StaleGeneration:
        return StaleGeneration(
            f"job {self.name} is at generation {self.generation}",
            f"this is from generation {generation}",
            "this process must end; the launcher starts its successor",
        )

    def refuse_stale(self, generation: int) -> None:
        """Raises StaleGeneration unless `generation` is the newest and not stopped."""
        if generation < self.generation or generation <= self.stop_through:
            raise self.stale(generation)

    def order_stop(self, through: int) -> None:
        """No trainer of generation `through` or older may run here any more."""
        if through <= self.stop_through:
            return
        self.stop_through = through
        self.grants.clear()
        self.save()
        self.changed()

    def order_start(self, order: coordinator_pb2.StartOrder) -> None:
        """Trainers of the newest generation may start here."""
        if order.generation != self.generation or self.start == order:
            return
        self.start = order
        self.started_generation = order.generation
        self.save()
        self.changed()

    @property
    def stopped_through(self) -> int:
        """The newest generation of which no trainer runs here, confirmed."""
        alive = [t.generation for t in self.trainers.values() if t.state == State.ALIVE and t.generation]
        if self.digesting or any(generation <= self.stop_through for generation in alive):
            return 0
        waits = self.confirmed_stopped < self.started_generation <= self.stop_through
        return 0 if waits else self.stop_through

    @property
    def running_generation(self) -> int:
        """The newest generation if all its ranks of this node have attached."""
        member = self.member
        if member is None:
            return 0
        attached = {t.rank for t in self.trainers.values() if t.generation == self.generation and t.attached}
        return self.generation if set(member.ranks) <= attached else 0

    def set_spec(self, spec: coordinator_pb2.JobSpec) -> None:
        if spec != self.spec:
            self.spec.CopyFrom(spec)
            self.save()

    # Trainers

    def send(self, trainer: Trainer, message: local_pb2.DaemonMessage, fd: int | None = None) -> None:
        if trainer.link is not None:
            trainer.link.send(message, fd)

    def living(self) -> list[Trainer]:
        """Trainers of the newest generation that are alive."""
        return [
            t for t in self.trainers.values() if t.state == State.ALIVE and t.generation == self.generation
        ]

    def ready(self, trainer: Trainer) -> bool:
        """Whether this rank's arena exists, so that it can take a step."""
        return self.memory.rank_arena(trainer.rank, trainer.plan_hash) is not None

    async def prepare(
        self, trainer: Trainer, plan: local_pb2.Plan, limit_bytes: int, held: dict[str, int]
    ) -> None:
        """Makes the arenas that a plan needs, parity's included, before the first step needs them.

        Raises:
            NoSpace: they do not fit; nothing was changed.
            InvalidRequest: not a plan.
        """
        check_plan(plan)
        arena = self.memory.rank_arena(trainer.rank, plan.plan_hash)
        if arena is None:
            self.check_budget(plan.image_bytes, limit_bytes, held)
        if arena is None or not arena.whole:
            await self.memory.prepare_rank_arena(trainer.rank, plan.plan_hash, self.places, plan.image_bytes)
        group, parity = self.group, self.roster.parity
        if self.member is not None and protected(group, parity):
            # The ranks of a job are nearly always of one size; the fold grows what is too small.
            node_bytes = padded(plan.image_bytes) * len(self.member.ranks)
            chunk_bytes = Geometry(len(group), parity).chunk_bytes(node_bytes)
            await self.memory.prepare_parity(self.slots, chunk_bytes * parity)

    def place_plan(
        self, trainer: Trainer, plan: local_pb2.Plan, limit_bytes: int, held: dict[str, int]
    ) -> Arena:
        """The arena for a rank's plan, made where there is none.

        Raises:
            NoSpace: it does not fit; nothing was changed.
            InvalidRequest: not a plan.
        """
        check_plan(plan)
        arena = self.memory.rank_arena(trainer.rank, plan.plan_hash)
        if arena is None:
            self.check_budget(plan.image_bytes, limit_bytes, held)
            arena = self.memory.make_rank_arena(trainer.rank, plan.plan_hash, self.places, plan.image_bytes)
        if arena.slot_bytes != padded(plan.image_bytes):
            raise InvalidRequest("the same plan with another size", f"{plan.image_bytes:,} bytes")
        if not arena.whole:
            arena.allocate()
        trainer.plan_hash, trainer.image_bytes = plan.plan_hash, plan.image_bytes
        self.grants.pop(trainer.rank, None)
        self._drop_unused_arenas()
        self.changed()
        return arena

    def check_budget(self, image_bytes: int, limit_bytes: int, held: dict[str, int]) -> tuple[int, int]:
        """(needed, available) bytes for ranks of this image size.

        Raises:
            NoSpace: with the numbers and who holds what.
        """
        ranks = len(self.member.ranks) if self.member else 1
        needed = budget.needed_bytes(
            image_bytes, ranks, self.slots, len(self.group), self.roster.parity, self.flush_places
        )
        return needed, budget.check(self.name, needed, limit_bytes, held)

    def grant(self) -> None:
        """Gives every due step a slot of every ready rank, as far as slots are free."""
        for trainer in self.living():
            if trainer.failing or trainer.generation <= self.stop_through or not self.ready(trainer):
                continue
            mine = self.grants.setdefault(trainer.rank, {})
            due = set(self.schedule.due)
            for step in [step for step in mine if step not in due]:
                del mine[step]
            arena = self.memory.rank_arena(trainer.rank, trainer.plan_hash)
            assert arena is not None
            free = self.memory.free_slots(arena, [place.slot for place in mine.values()])
            for step in sorted(due - set(mine) - self._taken(trainer.rank)):
                if free and step > trainer.step:
                    mine[step] = Place(arena, free.pop(0), trainer.image_bytes)
            self.push(trainer)

    def push(self, trainer: Trainer) -> None:
        """Tells a trainer its schedule and its grants."""
        grants = [
            local_pb2.Grant(step=step, slot=place.slot)
            for step, place in sorted(self.grants.get(trainer.rank, {}).items())
        ]
        body = local_pb2.Grants(schedule=self.schedule, grants=grants)
        if self.unreachable and not body.schedule.paused:
            body.schedule.paused = f"peers away: {', '.join(sorted(self.unreachable))}"
        self.send(trainer, local_pb2.DaemonMessage(grants=body))

    def _taken(self, rank: int) -> set[int]:
        held = self.memory.holdings.values()
        return {h.step for h in held if h.generation == self.generation and rank in h.places}

    def captured(self, trainer: Trainer, message: local_pb2.Captured) -> Holding:
        """Notes that an image lies complete in its slot; it is still to be digested.

        Raises:
            InvalidRequest: no such grant; a step that is still wanted is given up by the job.
        """
        place = self.grants.get(trainer.rank, {}).get(message.step)
        if place is None or place.slot != message.slot or message.plan_hash != trainer.plan_hash:
            if message.step not in self._taken(trainer.rank):
                self.abort(message.step)  # its image is nowhere, so nobody need wait for it
            raise InvalidRequest(
                f"rank {trainer.rank} has no grant for step {message.step} in slot {message.slot}",
                "the step was given up in the meantime",
            )
        del self.grants[trainer.rank][message.step]
        holding = self.memory.holdings.get((self.generation, message.step)) or self.new_holding(message.step)
        holding.places[trainer.rank] = place
        return holding

    def abort(self, step: int) -> None:
        """Gives a step up; the coordinator tells the others.

        What others may count on stays: the step that this generation started from, the
        watermark and what came before it, and a step that was reported as folded.
        """
        holding = self.memory.holdings.get((self.generation, step))
        if holding is None or not holding.folded:
            self._abort(step)

    def give_up(self, holding: Holding) -> None:
        """Gives a step up of which somebody still lacks what this node has only damaged.

        It may have been reported as folded here; nobody can count on it, since it is not
        folded where this node's part is lacking.
        """
        self.suspect()
        if self.memory.holdings.get(holding.key) is holding and holding.generation == self.generation:
            self._abort(holding.step)

    def suspect(self) -> None:
        """Somebody ran into damaged bytes of this job: the scrub looks for them before all else."""
        self.suspects = set(self.memory.holdings)

    def _abort(self, step: int) -> None:
        known = self.schedule.watermark if self.schedule.has_watermark else 0
        if step <= max(known, self.roster.start.step):
            return
        if self.generation and step not in self.aborted:
            self.aborted.add(step)
            self.memory.release((self.generation, step))
            self.changed()

    # Holdings

    def new_holding(self, step: int) -> Holding:
        """An empty holding of the newest generation."""
        member = self.member
        assert member is not None
        holding = Holding(
            self.generation, step, self.group, self.node, self.roster.parity, tuple(member.ranks)
        )
        self.memory.holdings[holding.key] = holding
        return holding

    def reseal_start(self) -> Holding | None:
        """The step that this generation starts from, as a snapshot of this generation.

        The images stay where they are; what is new is the group that protects them.
        """
        start = self.roster.start
        old = self.memory.holdings.get((start.generation, start.step))
        if not start.step or old is None:
            return None
        # A peer that was faster may have sent its seal record already.
        holding = self.memory.holdings.get((self.generation, start.step)) or self.new_holding(start.step)
        if holding.sealed:
            return None
        holding.places = dict(old.places)
        for rank in holding.ranks:
            holding.seal_rank(old.rank_seals[rank], self.name)
        self.memory.save(holding)
        return holding

    def apply(self, schedule: common_pb2.Schedule) -> None:
        """Takes over a schedule: frees what it allows, grants what is due, tells the trainers."""
        if schedule.generation != self.generation:
            return
        known = self.schedule
        if known.has_watermark and (not schedule.has_watermark or schedule.watermark < known.watermark):
            schedule.watermark, schedule.has_watermark = known.watermark, True
        if schedule == known and not self._waiting_for_slots():
            return
        moved = schedule.watermark != known.watermark or schedule.has_watermark != known.has_watermark
        self.schedule = schedule
        self.release_unneeded()
        self.grant()
        if moved:
            self.changed()

    def release_unneeded(self) -> None:
        """Frees what nobody can need any more."""
        watermark = self.schedule.watermark if self.schedule.has_watermark else None
        given_up = self.aborted | set(self.schedule.aborted)
        self.memory.release_unneeded(self.generation, watermark, given_up)
        self._drop_unused_arenas()
        self.aborted = {step for step in self.aborted if watermark is None or step > watermark}

    def _waiting_for_slots(self) -> bool:
        due = set(self.schedule.due)
        return any(due - set(self.grants.get(t.rank, {})) - self._taken(t.rank) for t in self.living())

    def place_parity(self, holding: Holding, chunk_bytes: int) -> Parity | None:
        """A free place for a holding's parity chunks, or None while there is none."""
        start = self.roster.start
        return self.memory.place_parity(holding, chunk_bytes, self.slots, (start.generation, start.step))

    def _drop_unused_arenas(self) -> None:
        ranks = list(self.member.ranks) if self.member else []
        plans = {t.rank: t.plan_hash for t in self.living() if t.plan_hash}
        self.memory.drop_unused(ranks, plans)

    # Facts and records

    def report(self) -> coordinator_pb2.JobReport:
        """All facts of this job on this node."""
        return report_of(self)

    def save(self) -> None:
        """Writes what must outlive the daemon."""
        if self.directory.is_dir():
            records.write_record(self.directory / "job.record", record_of(self))

    def discard(self) -> None:
        """Frees the job's memory and forgets it on this node."""
        self.memory.discard()
        shutil.rmtree(self.directory, ignore_errors=True)


def rank_seal(rank: int, place: Place, digests: bytes) -> bulk_pb2.RankSeal:
    """The seal of one rank's image."""
    return bulk_pb2.RankSeal(
        rank=rank, image_bytes=place.image_bytes, plan_hash=place.arena.plan_hash, cell_digests=digests
    )


def check_plan(plan: local_pb2.Plan) -> None:
    """Raises InvalidRequest unless `plan` has a size and a hash."""
    if not plan.image_bytes or len(plan.plan_hash) != 16:
        raise InvalidRequest("not a plan", f"{plan.image_bytes} bytes, a hash of {len(plan.plan_hash)} bytes")


def held_by(jobs: Iterable[Job]) -> dict[str, int]:
    """Bytes that each job takes on this node, or was promised."""
    return {
        job.name: max(sum(job.memory.nbytes()), job.promised_bytes if job.living() else 0) for job in jobs
    }
