"""What the coordinator's machine asks its shell to do, in this order.

A `Record` is on stable storage before any later effect is carried out.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.coordinator.events import Spec
from ckptd.memory.inventory import Roster
from ckptd.memory.schedule import Schedule
from ckptd.recovery.plan import Plan, TransferOrder


@dataclass(frozen=True)
class SpecEntry:
    """A job was declared, or learned from its nodes."""

    spec: Spec
    # The greatest generation that had used this name before, as its checkpoints tell.
    generation: int = 0


@dataclass(frozen=True)
class CommitEntry:
    """One generation of a job.  Invariant: at most one entry for each (job, generation)."""

    job: str
    plan: Plan


@dataclass(frozen=True)
class ProtectedEntry:
    """This job had a protected step once: from now on a fresh start would lose something."""

    job: str


@dataclass(frozen=True)
class FinishEntry:
    """The job is finished on all nodes."""

    job: str


Entry = SpecEntry | CommitEntry | ProtectedEntry | FinishEntry


@dataclass(frozen=True)
class StartOrder:
    generation: int
    master_host: str
    master_port: int


@dataclass(frozen=True)
class JobDirective:
    """All wishes to one node about one job; see the wire's JobDirective."""

    job: str
    spec: Spec
    roster: Roster | None = None
    stop_through: int = 0
    transfer: TransferOrder | None = None
    start: StartOrder | None = None
    schedule: Schedule | None = None
    finished: bool = False
    waiting_for: str = ""


@dataclass(frozen=True)
class Directive:
    """All wishes to one node; a later one replaces it whole."""

    # Of the newest report that these wishes take into account.
    sequence: int
    jobs: tuple[JobDirective, ...] = ()


@dataclass(frozen=True)
class Record:
    entry: Entry


@dataclass(frozen=True)
class Send:
    node: str
    directive: Directive


@dataclass(frozen=True)
class Probe:
    """Ask the daemon at `address` whether it lives; answer by a Probed event with this number."""

    node: str
    address: str
    number: int


@dataclass(frozen=True)
class AskStore:
    """Look for the newest whole checkpoint of `job`; answer by a Stored event if there is one."""

    job: str


@dataclass(frozen=True)
class Announce:
    """One line of a job's history; the names are listed at the wire's TimelineEvent."""

    at: float
    name: str
    job: str = ""
    generation: int = 0
    text: str = ""
    step: int = 0
    nodes: tuple[str, ...] = ()
    rung: str = ""


Effect = Record | Send | Probe | AskStore | Announce
