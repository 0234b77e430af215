"""What is wrong with a job, and what to do about it: evidence in, plan out.

Everything here is level-triggered: it looks at the newest facts of all nodes, never
at what changed, so a lost or repeated report makes no difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ckptd.coordinator.events import JobFacts, TrainerState, TransferState
from ckptd.coordinator.state import (
    ADOPTING,
    FINISHED,
    RUNNING,
    STARTING,
    TRANSFERRING,
    Job,
    Node,
    State,
)
from ckptd.memory.inventory import Choice, Fresh, Snapshot, Unrecoverable, newest_recoverable
from ckptd.recovery.ladder import Rung
from ckptd.recovery.plan import Plan, Volunteer, make_plan, seats_of


@dataclass(frozen=True)
class Waiting:
    """No plan can be made yet."""

    # What for, as status and the trainers' daemons show it.
    what: str
    # Memory alone does not bring the job back, until lost nodes return.
    unrecoverable: bool = False


def trouble(state: State, job: Job) -> str:
    """Why the job's generation cannot go on; empty if it can.

    Later evidence (a hang, a loss that is not finite, a slow rank, an operator) is one
    more line here.
    """
    assert job.roster is not None
    generation = job.roster.generation
    failed: list[str] = []
    for name in job.members:
        node = state.nodes.get(name)
        if node is None:
            continue
        facts = node.facts(job.spec.job)
        current = facts if facts is not None and facts.generation == generation else None
        if current is not None and current.finished:
            continue
        if current is not None:
            failed += [
                f"rank {t.rank} on {name} died ({t.exit or 'no exit status'})"
                for t in current.trainers
                if t.generation == generation and t.state == TrainerState.DIED
            ]
        known = facts.generation if facts is not None else 0
        adopted = job.phase == ADOPTING and node.report is not None
        if node.forgot.get(job.spec.job) == generation or (adopted and known < generation):
            # It would take the roster for new, and start this generation a second time.
            failed.append(f"{name} came back without its memory")
        elif node.dead:
            failed.append(f"node {name} died")
        elif facts is not None and facts.stopped_through >= generation:
            failed.append(f"{name} has stopped its trainers")
        elif why := _phase_trouble(state, job, node, current):
            failed.append(f"{name} {why}")
    return "; ".join(failed)


def _phase_trouble(state: State, job: Job, node: Node, facts: JobFacts | None) -> str:
    assert job.roster is not None
    timing, now = state.timing, state.now
    running = facts is not None and facts.running_generation == job.roster.generation
    if job.phase in (TRANSFERRING, STARTING) and facts is not None and not running:
        transfer = facts.transfer
        if transfer is not None and transfer.generation == facts.generation:
            if transfer.state == TransferState.FAILED:
                return f"could not bring its images: {transfer.reason}"
            moved = job.moved.get(node.name)
            stalled = moved is not None and now - moved[1] >= timing.transfer_stall_s
            if transfer.state == TransferState.RUNNING and stalled:
                return f"moved nothing for {timing.transfer_stall_s:g} s"
    if job.phase == TRANSFERRING and now - job.since >= timing.transfer_stall_s and facts is None:
        return "did not take up its transfer"
    if job.phase == STARTING and not running and now - job.since >= timing.start_timeout_s:
        return f"did not start its trainers within {timing.start_timeout_s:g} s"
    if job.phase == RUNNING and node.connected and not running:
        # The daemon is new and its trainers never came back to it: perhaps the machine restarted.
        still = now - max(job.progress.at, job.since)
        bound = timing.daemon_grace_s if job.progress.step_s is None else 5 * max(1.0, job.progress.step_s)
        if still >= bound:
            return "has none of its trainers, and no step was completed since"
    return ""


def doubtful(state: State, job: Job) -> frozenset[str]:
    """Members whose transfer failed or stalled: better not chosen again."""
    if job.phase not in (TRANSFERRING, STARTING):
        return frozenset()
    return frozenset(
        name
        for name in job.members
        if (node := state.nodes.get(name)) is not None
        and _phase_trouble(state, job, node, node.facts(job.spec.job))
    )


def confirmed(node: Node, job: Job) -> bool:
    """Whether no trainer of a stopped generation of this job runs on this node."""
    facts = node.facts(job.spec.job)
    if node.name not in job.members and (facts is None or not facts.generation):
        return True  # it never belonged to the job, as far as it remembers and we do
    return facts is not None and facts.stopped_through >= job.stop_through


def unresolved(state: State, job: Job) -> tuple[str, ...]:
    """Members that are neither dead nor confirmed stopped: an incident waits for them."""
    waiting = []
    for name in job.members:
        node = state.nodes.get(name)
        if node is None or node.dead:
            continue
        if not node.alive or not confirmed(node, job):
            waiting.append(name)
    return tuple(waiting)


def volunteers(state: State, job: Job) -> list[Volunteer]:
    """Nodes that may get ranks of this job, by name."""
    taken = {
        name
        for other in state.jobs.values()
        if other.spec.job != job.spec.job and other.phase != FINISHED
        for name in other.members
    }
    found = []
    for name, node in sorted(state.nodes.items(), key=lambda item: natural(item[0])):
        report = node.report
        if report is None or not node.alive or name in taken or not confirmed(node, job):
            continue
        found.append(
            Volunteer(
                node=name,
                domain=report.domain,
                control_address=report.control_address,
                bulk_address=report.bulk_address,
                rendezvous_host=report.rendezvous_host,
                rendezvous_port=report.rendezvous_port,
                doubtful=name in job.doubtful,
            )
        )
    return found


def plan(state: State, job: Job) -> Plan | Waiting:
    """The plan of the next generation from what living nodes hold, or what it waits for."""
    living = {name: node for name, node in state.nodes.items() if node.alive and node.report is not None}
    facts = {name: f for name, node in living.items() if (f := node.facts(job.spec.job)) is not None}
    choice = newest_recoverable(
        {name: f.holdings for name, f in facts.items()},
        job.spec.world,
        job.rosters,
        ever_protected=job.ever_protected or any(f.facts.watermark is not None for f in facts.values()),
    )
    candidates = volunteers(state, job)
    stored = _from_storage(state, job) if isinstance(choice, Unrecoverable) else None
    if isinstance(choice, Unrecoverable) and stored is None:
        return Waiting(_lost(job, living) + "; ".join(choice.refusals[:4]), unrecoverable=True)
    missing = job.spec.nodes - len(candidates)
    if missing > 0:
        return Waiting(f"{missing} more node{'s' if missing > 1 else ''}")
    if isinstance(choice, Unrecoverable):
        assert stored is not None
        found = f"storage has step {stored.step} of generation {stored.generation}"
        fresh = Fresh((*choice.refusals[:4], found))
        return replace(_made(job, fresh, candidates, living), rung=Rung.STORAGE)
    return _made(job, choice, candidates, living)


def _from_storage(state: State, job: Job) -> Snapshot | None:
    """The checkpoint to go on from, once lost nodes had the time to come back with their memory."""
    waited = job.lost_since is not None and state.now >= job.lost_since + state.timing.storage_after_s
    return job.stored if waited else None


def _made(job: Job, choice: Choice | Fresh, candidates: list[Volunteer], living: Mapping[str, Node]) -> Plan:
    seats = seats_of(choice, job.roster, job.spec.nodes, job.spec.ranks_per_node)
    addresses = {name: node.report.bulk_address for name, node in living.items() if node.report is not None}
    return make_plan(job.generation + 1, choice, candidates, seats, job.spec.parity, addresses)


def _lost(job: Job, living: Mapping[str, Node]) -> str:
    gone = [name for name in job.members if name not in living]
    return f"the return of {', '.join(gone)}: " if gone else ""


def schedule_away(state: State, job: Job) -> dict[str, str]:
    """Members whose facts are not fresh, and why, for the schedule's `paused`."""
    away = {}
    for name in job.members:
        node = state.nodes.get(name)
        if node is None or not node.alive:
            away[name] = "is dead" if node is not None and node.dead else "is away"
        elif job.phase == RUNNING and not _attached(node, job):
            # Its daemon is new.  The trainers come back to it in their next run.step(), which they
            # do not reach while the others wait for protection.
            away[name] = "has a new daemon, and its trainers are not back yet"
    return away


def _attached(node: Node, job: Job) -> bool:
    facts = node.facts(job.spec.job)
    return facts is not None and job.roster is not None and facts.running_generation == job.roster.generation


def heard_all(state: State, job: Job) -> bool:
    """Whether every member reported to this coordinator, or had the time to."""
    if state.now >= state.timing.settle_s:
        return True
    nodes = (state.nodes.get(name) for name in job.members)
    return all(node is not None and node.report is not None for node in nodes)


def watched(job: Job) -> bool:
    """Whether the generation is meant to be alive, so that trouble ends it."""
    return job.phase in (ADOPTING, TRANSFERRING, STARTING, RUNNING)


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key in which n2 comes before n10."""
    parts: list[tuple[int, int | str]] = []
    digits = text = ""
    for char in name + "\0":
        if char.isdecimal() and char.isascii():
            if text:
                parts.append((1, text))
                text = ""
            digits += char
        else:
            if digits:
                parts.append((0, int(digits)))
                digits = ""
            text += char
    return (*parts, (1, text))
