"""The coordinator's state: immutable values; `machine.step` makes the next from the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptd.coordinator.effects import Directive
from ckptd.coordinator.events import Answer, JobFacts, NodeReport, Spec
from ckptd.memory.inventory import Roster, Snapshot
from ckptd.memory.schedule import Schedule
from ckptd.recovery.plan import Plan


@dataclass(frozen=True)
class Timing:
    """Every time that the machine uses, in seconds."""

    tick_s: float = 0.05
    # A connected daemon that says nothing for so long, and answers no probe, is dead.
    silence_s: float = 1.0
    # How long evidence is gathered, so that ten deaths are one incident.
    gather_s: float = 0.15
    # A daemon whose stream ended and whose port refuses is dead after this time, where
    # its job's trainers died too or it runs none.
    dead_after_s: float = 0.3
    probe_every_s: float = 0.25
    probe_lost_s: float = 1.0
    # Ranks that completed a step within this time prove that their group's nodes live.
    moving_s: float = 0.4
    # No step for three typical ones counts as standstill: at least and at most these.
    stall_min_s: float = 1.5
    daemon_grace_s: float = 30.0
    # After its own start the coordinator first listens.
    settle_s: float = 1.0
    # A member that confirms no stop, or moves no byte, for so long counts as lost.
    stop_timeout_s: float = 15.0
    transfer_stall_s: float = 10.0
    start_timeout_s: float = 600.0
    # Generations that fail before their first step: pause before the next one, doubling.
    retry_first_s: float = 0.2
    retry_most_s: float = 10.0
    # When memory has nothing whole any more: how long lost nodes may take to come back with theirs before
    # the job goes on from storage, and how often the store is asked.
    storage_after_s: float = 30.0
    # A dead node that belongs to no job is forgotten.
    forget_s: float = 600.0


@dataclass(frozen=True)
class ProbeState:
    number: int
    asked: float
    answer: Answer | None = None


@dataclass(frozen=True)
class Node:
    """One node as the coordinator sees it.  Times are `State.now`."""

    name: str
    control_address: str
    # The newest report; None for a node known from the journal only.
    report: NodeReport | None = None
    # Number of its stream, and whether that is open.
    session: int = 0
    connected: bool = False
    heard: float = 0.0
    # Widest recent pause between two reports.
    gap_s: float = 0.0
    # When the stream ended; None while connected, or never heard.
    left: float | None = None
    probe: ProbeState | None = None
    suspect: bool = False
    dead: bool = False
    past_incarnations: tuple[int, ...] = ()
    # Newest generation of each job that an earlier life of this node had accepted and this
    # one does not know: its memory is gone, and so are its trainers.
    forgot: Mapping[str, int] = field(default_factory=dict)
    sent: Directive | None = None

    @property
    def alive(self) -> bool:
        """Connected and above suspicion."""
        return self.connected and not self.dead and not self.suspect

    def facts(self, job: str) -> JobFacts | None:
        return self.report.job(job) if self.report is not None else None


@dataclass(frozen=True)
class Incident:
    since: float
    gather_until: float
    # A member that has not confirmed its stop by now counts as lost.
    deadline: float
    cause: str


@dataclass(frozen=True)
class Progress:
    """Steps of the current generation."""

    # Newest completed step of any rank, and when it was first seen.
    step: int = 0
    at: float = 0.0
    # Typical duration of a step: a slowly falling maximum; None before the second step.
    step_s: float | None = None


# Phases in the order of a life; see machine.py.
FORMING, ADOPTING, INCIDENT, PLANNING = "forming", "adopting", "incident", "planning"
TRANSFERRING, STARTING, RUNNING, FINISHED = "transferring", "starting", "running", "finished"


@dataclass(frozen=True)
class Job:
    """One job.  Invariant: roster.generation <= generation, and `generation` never falls."""

    spec: Spec
    phase: str = FORMING
    since: float = 0.0
    # The highest generation seen anywhere; the next one committed is greater.
    generation: int = 0
    roster: Roster | None = None
    # Memberships of the past, newest 16: they tell which holdings are void.
    rosters: Mapping[int, Roster] = field(default_factory=dict)
    # How the current generation came to be; None when it was learned from nodes.
    plan: Plan | None = None
    # No trainer of this generation or an older one may run.
    stop_through: int = 0
    schedule: Schedule | None = None
    ever_protected: bool = False
    incident: Incident | None = None
    progress: Progress = Progress()
    # Bytes that each member's transfer has moved, and since when this has not changed.
    moved: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    # Members whose transfer failed in this incident.
    doubtful: frozenset[str] = frozenset()
    # Generations in a row that ended before their first step, and when the next may begin.
    failures: int = 0
    retry_at: float = 0.0
    waiting_for: str = ""
    # Since when memory has nothing whole, and when the store was asked last; None: it has, or was not.
    lost_since: float | None = None
    asked_at: float | None = None
    # The newest checkpoint in the store, as far as somebody asked.
    stored: Snapshot | None = None

    @property
    def members(self) -> tuple[str, ...]:
        return self.roster.nodes if self.roster is not None else ()


@dataclass(frozen=True)
class State:
    timing: Timing = Timing()
    # Seconds that the coordinator was awake: the clock of all its patience.  A step of the
    # real clock counts as two ticks at most, so that while the coordinator itself is held
    # up nobody else's silence is counted.
    now: float = 0.0
    # The real time of the newest event; None before the first.
    at: float | None = None
    nodes: Mapping[str, Node] = field(default_factory=dict)
    jobs: Mapping[str, Job] = field(default_factory=dict)
    probes: int = 0
