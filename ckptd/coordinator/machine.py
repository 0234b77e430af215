"""The coordinator's brain: a pure function from state and event to state and effects.

It reads no clock, draws no number, does no I/O: time is a field of events.  The shell
(`server.py`) feeds it and carries its effects out, in order, each Record to stable
storage before anything after it.  `restore` replays the journal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ckptd.coordinator import detector, directives, incident, jobs
from ckptd.coordinator.effects import (
    Announce,
    CommitEntry,
    Effect,
    Entry,
    FinishEntry,
    Probe,
    ProtectedEntry,
    Record,
    SpecEntry,
)
from ckptd.coordinator.events import (
    Disconnected,
    Event,
    JobFacts,
    NodeReport,
    Probed,
    Reported,
    Spec,
    Stored,
    Submitted,
    Tick,
)
from ckptd.coordinator.state import (
    ADOPTING,
    FINISHED,
    RUNNING,
    STARTING,
    Job,
    Node,
    Progress,
    State,
    Timing,
)
from ckptd.errors import InvalidRequest
from ckptd.memory.inventory import Roster
from ckptd.memory.schedule import next_schedule

_KEPT_INCARNATIONS = 4


def step(state: State, event: Event) -> tuple[State, list[Effect]]:
    """The next state, and what the shell is to do, in order."""
    before = state = _awake(state, event.at)
    effects: list[Effect] = []
    touched: set[str] = set()
    match event:
        case Tick():
            pass
        case Reported():
            for session, report in event.reports:
                state, more = _reported(state, session, report)
                effects += more
                touched.add(report.node)
        case Disconnected():
            node = state.nodes.get(event.node)
            if node is not None and node.session == event.session and node.connected:
                state = _with_node(state, replace(node, connected=False, left=state.now, sent=None))
        case Probed():
            if (node := state.nodes.get(event.node)) is not None:
                state = _with_node(state, detector.answered(node, event.number, event.answer))
        case Submitted():
            if event.spec.job not in state.jobs:
                state = _with_job(state, Job(event.spec, since=state.now, generation=event.generation))
                effects.append(Record(SpecEntry(event.spec, event.generation)))
        case Stored():
            if (job := state.jobs.get(event.job)) is not None:
                newest = max(job.generation, event.checkpoint.generation)
                state = _with_job(state, replace(job, stored=event.checkpoint, generation=newest))
    if not isinstance(event, Reported):
        # A report changes nobody else's silence; the next tick is soon enough.
        state, more = _examine_nodes(state)
        effects += more
    if not isinstance(event, Reported) or _told_anything(before, state, touched):
        for name in sorted(state.jobs):
            state, more = _job(state, name)
            effects += more
    state, more = directives.refresh(state, _to_refresh(before, state, touched))
    return state, effects + more


def check_submission(state: State, spec: Spec) -> bool:
    """Whether submitting `spec` creates a job; False if that very job is known.

    Raises:
        InvalidRequest: a spec that cannot be, or another spec under this name.
    """
    least = {"nodes": 1, "ranks_per_node": 1, "parity": 0, "every": 1, "slots": 2}
    for name, minimum in least.items():
        found = getattr(spec, name)
        if found < minimum:
            raise InvalidRequest(f"job {spec.job}: {name} must be {minimum} or more", f"found {found}")
    known = state.jobs.get(spec.job)
    if known is None:
        return True
    if known.spec != spec:
        raise InvalidRequest(
            f"job {spec.job} exists with another specification",
            f"known is {known.spec}, submitted was {spec}",
            "choose another name, or submit the same specification",
        )
    return False


def restore(entries: Iterable[Entry], timing: Timing) -> State:
    """The state that the journal's entries, oldest first, lead to.

    Jobs that were committed are `adopting`: what they do now, their nodes will tell.
    """
    state = State(timing)
    for entry in entries:
        if isinstance(entry, SpecEntry):
            state = _with_job(state, Job(entry.spec, generation=entry.generation))
            continue
        job = state.jobs[entry.job]
        match entry:
            case CommitEntry():
                job = _take_over(job, entry.plan.roster)
                job = replace(job, plan=entry.plan)
                state = _expect(state, entry.plan.roster)
            case ProtectedEntry():
                job = replace(job, ever_protected=True)
            case FinishEntry():
                job = replace(job, phase=FINISHED)
        state = _with_job(state, job)
    return state


def _awake(state: State, at: float) -> State:
    """Time passes, by no more than two ticks for an event: see State.now."""
    if state.at is None:
        return replace(state, at=at)
    gone = max(0.0, at - state.at)
    return replace(state, at=max(at, state.at), now=state.now + min(gone, 2 * state.timing.tick_s))


def _reported(state: State, session: int, report: NodeReport) -> tuple[State, list[Effect]]:
    known = state.nodes.get(report.node)
    node = known if known is not None else Node(report.node, report.control_address)
    over = session < node.session or (session == node.session and not node.connected)
    if over or report.incarnation in node.past_incarnations:
        return state, []  # of a stream that ended
    fresh = node.report is None or node.dead
    effects: list[Effect] = []
    if node.report is not None and node.report.incarnation != report.incarnation:
        past = (*node.past_incarnations, node.report.incarnation)[-_KEPT_INCARNATIONS:]
        node = replace(node, past_incarnations=past, forgot=_forgotten(node, report))
        if not fresh:
            effects.append(_news(state, "node-joined", node.name, "its daemon was restarted"))
    elif node.report is not None and session == node.session and report.sequence <= node.report.sequence:
        return state, []
    if fresh:
        effects.append(_news(state, "node-joined", report.node, "came back" if node.dead else ""))
    if session != node.session or not node.connected:
        # Whatever was sent on an older stream may never have arrived.
        node = replace(node, sent=None)
    same = node.report is not None and node.report.jobs == report.jobs
    node = detector.heard(replace(node, session=session), state.now)
    state = _with_node(state, replace(node, report=report, control_address=report.control_address))
    if not same:
        for facts in report.jobs:
            state, more = _learn(state, facts)
            effects += more
    return state, effects


def _forgotten(node: Node, report: NodeReport) -> dict[str, int]:
    forgot = dict(node.forgot)
    for facts in node.report.jobs if node.report is not None else ():
        now = report.job(facts.job)
        if facts.generation > (now.generation if now is not None else 0):
            forgot[facts.job] = facts.generation
    return forgot


def _learn(state: State, facts: JobFacts) -> tuple[State, list[Effect]]:
    """What a report tells about a job beyond the node itself: its existence, newer
    generations than this coordinator knows, older memberships."""
    effects: list[Effect] = []
    job = state.jobs.get(facts.job)
    if job is None:
        if facts.spec is None or facts.finished:
            return state, []
        job = Job(facts.spec, since=state.now)
        effects.append(Record(SpecEntry(facts.spec)))
    roster = facts.roster
    if roster is not None and roster.generation > job.generation:
        job = replace(_take_over(job, roster), since=state.now)
        state = _expect(state, roster)
    elif roster is not None and roster.generation not in job.rosters:
        job = replace(job, rosters=jobs.remember(job, roster))
    if facts.facts.watermark is not None and not job.ever_protected:
        job = replace(job, ever_protected=True)
        effects.append(Record(ProtectedEntry(facts.job)))
    return _with_job(state, job), effects


def _take_over(job: Job, roster: Roster) -> Job:
    """The job in a generation that this machine did not propose itself."""
    return replace(
        job,
        phase=ADOPTING,
        generation=roster.generation,
        roster=roster,
        rosters=jobs.remember(job, roster),
        plan=None,
        stop_through=max(job.stop_through, roster.generation - 1),
        schedule=None,
        incident=None,
        progress=Progress(step=roster.start.step),
        moved={},
        ever_protected=job.ever_protected or roster.start.step > 0,
    )


def _expect(state: State, roster: Roster) -> State:
    """Members that were never heard get a place, so that their absence is noticed."""
    nodes = dict(state.nodes)
    for member in roster.members:
        nodes.setdefault(member.node, Node(member.node, member.control_address))
    return replace(state, nodes=nodes)


def _told_anything(before: State, state: State, names: Iterable[str]) -> bool:
    """Whether reports of these nodes were more than heartbeats."""
    for name in names:
        old, new = before.nodes.get(name), state.nodes.get(name)
        if old is new or new is None:
            continue
        if old is None or old.report is None or new.report is None or old.alive != new.alive:
            return True
        if old.report.jobs != new.report.jobs or old.report.incarnation != new.report.incarnation:
            return True
    return False


def _examine_nodes(state: State) -> tuple[State, list[Effect]]:
    effects: list[Effect] = []
    nodes = dict(state.nodes)
    changed = False
    jobs_of = {name: job for job in state.jobs.values() if job.phase != FINISHED for name in job.members}
    probes = state.probes
    all_silent = detector.nobody_is_heard(state.nodes.values(), state.now, state.timing)
    for name, node in state.nodes.items():
        finding = detector.examine(node, jobs_of.get(name), state.now, state.timing, all_silent)
        seen = finding.node
        if finding.news:
            effects.append(_news(state, finding.news, name, finding.why))
        if finding.probe:
            probes += 1
            seen = detector.asked(seen, probes, state.now)
            effects.append(Probe(name, seen.control_address, probes))
        unheard_s = state.now - max(seen.heard, seen.left or 0.0)
        if seen.dead and name not in jobs_of and unheard_s >= state.timing.forget_s:
            del nodes[name]
            changed = True
        elif seen is not node:
            nodes[name] = seen
            changed = True
    return (replace(state, nodes=nodes, probes=probes) if changed else state), effects


def _job(state: State, name: str) -> tuple[State, list[Effect]]:
    """One job, carried as far as the facts allow."""
    job = state.jobs[name]
    effects: list[Effect] = []
    if job.phase in (ADOPTING, STARTING, RUNNING):
        job, effects = _schedule(state, _progress(state, job))
        state = _with_job(state, job)
    job, more = jobs.advance(state, job)
    return _with_job(state, job), effects + more


def _progress(state: State, job: Job) -> Job:
    """Notes the newest completed step of the current generation, and how long steps take."""
    assert job.roster is not None
    newest = max(
        (
            trainer.step
            for name in job.members
            if (node := state.nodes.get(name)) is not None and (facts := node.facts(job.spec.job)) is not None
            for trainer in facts.trainers
            if trainer.generation == job.roster.generation
        ),
        default=0,
    )
    old = job.progress
    if newest <= old.step:
        return job
    step_s = old.step_s
    if old.at:
        latest = (state.now - old.at) / (newest - old.step)
        step_s = max(latest, 0.9 * step_s) if step_s is not None else latest
    return replace(job, progress=Progress(newest, state.now, step_s))


def _schedule(state: State, job: Job) -> tuple[Job, list[Effect]]:
    roster = job.roster
    assert roster is not None
    if job.schedule is None and not incident.heard_all(state, job):
        return job, []
    facts = (
        known.facts
        for name in job.members
        if (node := state.nodes.get(name)) is not None and (known := node.facts(job.spec.job)) is not None
    )
    schedule = next_schedule(
        job.schedule,
        generation=roster.generation,
        start_step=roster.start.step,
        members=job.members,
        facts=facts,
        every=job.spec.every,
        slots=job.spec.slots,
        away=incident.schedule_away(state, job),
    )
    old = job.schedule.watermark if job.schedule is not None else None
    if schedule == job.schedule:
        return job, []
    effects: list[Effect] = []
    if schedule.watermark is not None and schedule.watermark != old:
        if not job.ever_protected:
            job = replace(job, ever_protected=True)
            effects.append(Record(ProtectedEntry(job.spec.job)))
        assert state.at is not None
        effects.append(
            Announce(state.at, "protected", job.spec.job, roster.generation, step=schedule.watermark)
        )
    return replace(job, schedule=schedule), effects


def _to_refresh(before: State, state: State, touched: set[str]) -> list[str]:
    """The nodes whose directive may have changed."""
    if before.jobs is not state.jobs:
        for name, job in state.jobs.items():
            old = before.jobs.get(name)
            if old is not job and (old is None or directives.wish(old) != directives.wish(job)):
                return sorted(state.nodes)
    return sorted(name for name in touched if name in state.nodes)


def _news(state: State, name: str, node: str, text: str) -> Announce:
    assert state.at is not None
    job = directives.membership(state, node)
    generation = job.roster.generation if job is not None and job.roster is not None else 0
    return Announce(state.at, name, job.spec.job if job is not None else "", generation, text, nodes=(node,))


def _with_node(state: State, node: Node) -> State:
    return replace(state, nodes={**state.nodes, node.name: node})


def _with_job(state: State, job: Job) -> State:
    if state.jobs.get(job.spec.job) is job:
        return state
    return replace(state, jobs={**state.jobs, job.spec.job: job})
