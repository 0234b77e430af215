"""The life of a job: one function for each phase, each a step towards `running`.

    forming ---------------------------+
                                       v
    running -> incident -> planning -> (commit) -> transferring -> starting -> running
       ^          ^                                     |             |
       |          +--------- any trouble ---------------+-------------+
    adopting: the coordinator is new, the job is not

Phases are left on facts alone.  A job that a coordinator finds in its journal, or
learns from its nodes, is `adopting` until all members are heard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ckptd.coordinator import incident
from ckptd.coordinator.effects import Announce, AskStore, CommitEntry, Effect, FinishEntry, Record
from ckptd.coordinator.events import JobFacts, TransferState
from ckptd.coordinator.state import (
    ADOPTING,
    FINISHED,
    FORMING,
    INCIDENT,
    PLANNING,
    RUNNING,
    STARTING,
    TRANSFERRING,
    Incident,
    Job,
    Progress,
    State,
)
from ckptd.memory.inventory import Roster
from ckptd.recovery.ladder import Rung
from ckptd.recovery.plan import Plan

# Rosters that are remembered, newest first.
KEPT_ROSTERS = 16
# The first failures in a row are retried at once.
_FREE_RETRIES = 2

Moved = tuple[Job, list[Effect]]


def advance(state: State, job: Job) -> Moved:
    """The job as far as the newest facts of all nodes carry it, and what is to be done."""
    effects: list[Effect] = []
    # Each pass leaves a phase for a later one of the cycle; one cycle has fewer than these.
    for _ in range(8):
        before = job
        if incident.watched(job) and (finished := _finished(state, job)) is not None:
            job, more = finished
        elif incident.watched(job) and (cause := incident.trouble(state, job)):
            job, more = _open_incident(state, job, cause)
        else:
            job, more = _PHASES[job.phase](state, job)
        effects += more
        if job.phase == before.phase:
            break
    return job, effects


def _forming(state: State, job: Job) -> Moved:
    # A coordinator that has just come up may be the successor of another one: it first
    # listens, since nodes that hold this job's memory may be about to say so.
    if state.now < state.timing.settle_s:
        return job, []
    return _try(state, job)


def _adopting(state: State, job: Job) -> Moved:
    assert job.roster is not None
    if _all_running(state, job):
        effects: list[Effect] = []
        if job.plan is None:
            job = replace(job, plan=adopted_plan(job.roster))
            assert job.plan is not None
            effects.append(Record(CommitEntry(job.spec.job, job.plan)))
        text = "found running by a new coordinator"
        return _enter(state, job, RUNNING), [*effects, _say(state, job, "running", text)]
    if not all((n := state.nodes.get(m)) is not None and n.report is not None for m in job.members):
        return job, []
    met = job.plan is not None and bool(job.plan.master_host)
    if any(_runs(job, _current(state, job, name)) for name in job.members):
        # Started, and not everywhere attached: still starting, or a daemon is new as well.
        timing = state.timing
        patience = timing.start_timeout_s if met else timing.daemon_grace_s
        if state.now - max(job.since, job.progress.at) < patience:
            return job, []
    elif met:
        # All members know this generation (else there is trouble): its orders may be repeated.
        return _enter(state, job, TRANSFERRING), []
    # How this generation was to come about is lost with the journal; what nodes hold is not.
    return _open_incident(state, job, "a new coordinator found the job neither running nor being started")


def _open_incident(state: State, job: Job, cause: str) -> Moved:
    assert job.roster is not None
    generation = job.roster.generation
    completed = job.progress.step > job.roster.start.step
    failures = 0 if completed else job.failures + (job.phase != ADOPTING)
    pause = 0.0
    if failures > _FREE_RETRIES:
        # 2.0 ** 16 is beyond any bound that makes sense; the exponent must not overflow.
        doublings = min(16, failures - _FREE_RETRIES - 1)
        pause = min(state.timing.retry_most_s, state.timing.retry_first_s * 2.0**doublings)
    now, timing = state.now, state.timing
    opened = replace(
        _enter(state, job, INCIDENT),
        stop_through=max(job.stop_through, generation),
        incident=Incident(now, now + timing.gather_s, now + timing.stop_timeout_s, cause),
        doubtful=job.doubtful | incident.doubtful(state, job),
        failures=failures,
        retry_at=now + pause,
    )
    return opened, [_say(state, opened, "incident", cause)]


def _incident(state: State, job: Job) -> Moved:
    assert job.incident is not None
    if state.now < job.incident.gather_until:
        return job, []
    effects: list[Effect] = []
    if late := incident.unresolved(state, job):
        if state.now < job.incident.deadline:
            return replace(job, waiting_for=f"{', '.join(late)} to confirm the stop"), []
        # It is fenced by the new generation, and takes part again once it has confirmed.
        why = f"no confirmation of the stop within {state.timing.stop_timeout_s:g} s: counted as lost"
        effects.append(_say(state, job, "node-dead", why, nodes=late))
    job = replace(_enter(state, job, PLANNING), waiting_for="")
    return job, [*effects, _say(state, job, "stopped")]


def _planning(state: State, job: Job) -> Moved:
    if state.now < job.retry_at:
        return replace(job, waiting_for=f"a pause after {job.failures} failures in a row"), []
    return _try(state, job)


def _try(state: State, job: Job) -> Moved:
    found = incident.plan(state, job)
    if isinstance(found, Plan):
        return _commit(state, job, found)
    effects: list[Effect] = []
    if found.unrecoverable:
        job, effects = _ask_store(state, job)
    if found.what == job.waiting_for:
        return job, effects
    job = replace(job, waiting_for=found.what)
    said = _say(state, job, "unrecoverable" if found.unrecoverable else "waiting", found.what)
    return job, [*effects, said]


def _ask_store(state: State, job: Job) -> Moved:
    """Memory has nothing whole: the store may have; it is asked now and then."""
    job = replace(job, lost_since=state.now if job.lost_since is None else job.lost_since)
    if job.asked_at is not None and state.now < job.asked_at + state.timing.storage_after_s:
        return job, []
    return replace(job, asked_at=state.now), [AskStore(job.spec.job)]


def _commit(state: State, job: Job, plan: Plan) -> Moved:
    generation = plan.roster.generation
    assert generation > job.generation, "a generation is used once"
    formed = job.roster is None
    start = plan.roster.start
    committed = replace(
        _enter(state, job, TRANSFERRING),
        generation=generation,
        roster=plan.roster,
        rosters=remember(job, plan.roster),
        plan=plan,
        stop_through=generation - 1,
        schedule=None,
        incident=None,
        progress=Progress(step=start.step),
        moved={},
        waiting_for="",
        lost_since=None,
        asked_at=None,
        stored=None,
    )
    names = plan.roster.nodes
    effects: list[Effect] = []
    if formed:
        effects.append(_say(state, committed, "job-formed", nodes=names))
    effects.append(
        _say(state, committed, "planned", plan.describe(), step=start.step, nodes=names, rung=plan.rung)
    )
    # The journal first: no node hears of a generation that could be proposed a second time.
    effects.append(Record(CommitEntry(job.spec.job, plan)))
    effects.append(_say(state, committed, "committed", step=start.step, nodes=names, rung=plan.rung))
    return committed, effects


def _transferring(state: State, job: Job) -> Moved:
    plan, roster = job.plan, job.roster
    assert plan is not None and roster is not None
    moved = dict(job.moved)
    done = True
    for name in job.members:
        facts = _current(state, job, name)
        transfer = facts.transfer if facts is not None else None
        if transfer is None or transfer.generation != roster.generation:
            done = done and bool(_runs(job, facts))
            continue
        done = done and (transfer.state == TransferState.VERIFIED or _runs(job, facts))
        if moved.get(name, (-1, 0.0))[0] != transfer.nbytes:
            moved[name] = (transfer.nbytes, state.now)
    if moved != job.moved:
        job = replace(job, moved=moved)
    if plan.orders and not done:
        return job, []
    effects: list[Effect] = []
    if plan.orders:
        effects.append(_say(state, job, "transferred", step=roster.start.step, rung=plan.rung))
    job = _enter(state, job, STARTING)
    where = f"rank 0 meets at {plan.master_host}:{plan.master_port}"
    return job, [*effects, _say(state, job, "started", where, step=roster.start.step)]


def _starting(state: State, job: Job) -> Moved:
    if not _all_running(state, job):
        return job, []
    assert job.roster is not None
    step = job.roster.start.step
    job = replace(_enter(state, job, RUNNING), doubtful=frozenset())
    return job, [_say(state, job, "running", step=step, nodes=job.members)]


def _stays(state: State, job: Job) -> Moved:
    return job, []


_PHASES: dict[str, Callable[[State, Job], Moved]] = {
    FORMING: _forming,
    ADOPTING: _adopting,
    INCIDENT: _incident,
    PLANNING: _planning,
    TRANSFERRING: _transferring,
    STARTING: _starting,
    RUNNING: _stays,
    FINISHED: _stays,
}


def _finished(state: State, job: Job) -> Moved | None:
    members = [_current(state, job, name) for name in job.members]
    if not all(facts is not None and facts.finished for facts in members):
        return None
    done = _enter(state, job, FINISHED)
    return done, [Record(FinishEntry(job.spec.job)), _say(state, done, "finished", step=job.progress.step)]


def adopted_plan(roster: Roster) -> Plan:
    """A plan for a generation that was learned from nodes: the roster is all that is known."""
    return Plan(roster, (), "", 0, Rung.NONE, ("learned from the nodes",))


def remember(job: Job, roster: Roster) -> dict[int, Roster]:
    """The job's rosters with this one."""
    rosters = {**job.rosters, roster.generation: roster}
    return {generation: rosters[generation] for generation in sorted(rosters)[-KEPT_ROSTERS:]}


def _current(state: State, job: Job, name: str) -> JobFacts | None:
    """What `name` says about the job's current generation."""
    node = state.nodes.get(name)
    facts = node.facts(job.spec.job) if node is not None else None
    assert job.roster is not None
    return facts if facts is not None and facts.generation == job.roster.generation else None


def _runs(job: Job, facts: JobFacts | None) -> bool:
    assert job.roster is not None
    return facts is not None and facts.running_generation == job.roster.generation


def _all_running(state: State, job: Job) -> bool:
    return all(_runs(job, _current(state, job, name)) for name in job.members)


def _enter(state: State, job: Job, phase: str) -> Job:
    return replace(job, phase=phase, since=state.now)


def _say(
    state: State,
    job: Job,
    name: str,
    text: str = "",
    *,
    step: int = 0,
    nodes: tuple[str, ...] = (),
    rung: str = "",
) -> Announce:
    assert state.at is not None
    generation = job.roster.generation if job.roster is not None else 0
    return Announce(state.at, name, job.spec.job, generation, text, step, nodes, str(rung))
