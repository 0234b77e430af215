"""What the coordinator's machine is told: facts from nodes, and the events that carry them.

Times are seconds of CLOCK_MONOTONIC, given by the shell; the machine reads no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ckptd.memory.inventory import HoldingFact, Roster, Snapshot
from ckptd.memory.schedule import NodeFacts


@dataclass(frozen=True)
class Spec:
    """What a job is; see the wire's JobSpec."""

    job: str
    nodes: int
    ranks_per_node: int
    parity: int
    every: int
    slots: int

    @property
    def world(self) -> range:
        return range(self.nodes * self.ranks_per_node)


class TrainerState(Enum):
    ALIVE = 1
    # Without a goodbye.
    DIED = 2
    FINISHED = 3


@dataclass(frozen=True)
class TrainerFact:
    rank: int
    generation: int
    state: TrainerState
    step: int = 0
    exit: str = ""


class TransferState(Enum):
    RUNNING = 1
    VERIFIED = 2
    FAILED = 3


@dataclass(frozen=True)
class TransferFact:
    generation: int
    state: TransferState
    reason: str = ""
    nbytes: int = 0
    rung: str = ""


@dataclass(frozen=True)
class JobFacts:
    """All that one node says about one job; see the wire's JobReport."""

    job: str
    spec: Spec | None
    # The newest membership that the node accepted.
    roster: Roster | None
    # About the roster's generation: what the schedule is computed from.
    facts: NodeFacts
    stopped_through: int = 0
    running_generation: int = 0
    trainers: tuple[TrainerFact, ...] = ()
    holdings: tuple[HoldingFact, ...] = ()
    transfer: TransferFact | None = None
    finished: bool = False

    @property
    def generation(self) -> int:
        return self.facts.generation


@dataclass(frozen=True)
class NodeReport:
    """All facts of one node; a later one replaces it whole."""

    node: str
    incarnation: int
    sequence: int
    domain: str = ""
    control_address: str = ""
    bulk_address: str = ""
    rendezvous_host: str = ""
    rendezvous_port: int = 0
    jobs: tuple[JobFacts, ...] = ()

    def job(self, name: str) -> JobFacts | None:
        return next((facts for facts in self.jobs if facts.job == name), None)


@dataclass(frozen=True)
class Tick:
    """Time has passed; comes every Timing.tick_s as far as the shell gets to it."""

    at: float


@dataclass(frozen=True)
class Reported:
    """Reports in the order of arrival, each with the number of the stream it came on."""

    at: float
    reports: tuple[tuple[int, NodeReport], ...]


@dataclass(frozen=True)
class Disconnected:
    """The stream with this number ended: an instant suspicion, not a death."""

    at: float
    node: str
    session: int


class Answer(Enum):
    """How a daemon took a probe."""

    ANSWERED = "answered"
    REFUSED = "refused"
    SILENT = "silent"


@dataclass(frozen=True)
class Probed:
    """The outcome of the Probe effect with the same number."""

    at: float
    node: str
    number: int
    answer: Answer


@dataclass(frozen=True)
class Submitted:
    """Somebody declared a job, and `machine.check_submission` had nothing against it."""

    at: float
    spec: Spec
    # The greatest generation of the checkpoints stored under this name; none may be used again.
    generation: int = 0


@dataclass(frozen=True)
class Stored:
    """The answer to AskStore: the newest whole checkpoint of the job."""

    at: float
    job: str
    checkpoint: Snapshot


Event = Tick | Reported | Disconnected | Probed | Submitted | Stored
