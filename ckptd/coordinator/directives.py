"""The wishes that follow from the state: what each node is to know and to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ckptd.coordinator import detector
from ckptd.coordinator.effects import Directive, Effect, JobDirective, Send, StartOrder
from ckptd.coordinator.state import (
    ADOPTING,
    FINISHED,
    FORMING,
    INCIDENT,
    PLANNING,
    RUNNING,
    STARTING,
    TRANSFERRING,
    Job,
    Node,
    State,
)
from ckptd.memory.schedule import Schedule


def refresh(state: State, names: Iterable[str]) -> tuple[State, list[Effect]]:
    """Sends to each named node that is connected what it does not know yet."""
    nodes = dict(state.nodes)
    effects: list[Effect] = []
    for name in names:
        node = nodes[name]
        if not node.connected or node.report is None:
            continue
        wishes = directive(state, node)
        # A directive that differs by its sequence number alone says nothing new.
        if node.sent is not None and node.sent.jobs == wishes.jobs:
            continue
        nodes[name] = replace(node, sent=wishes)
        effects.append(Send(name, wishes))
    return (replace(state, nodes=nodes) if effects else state), effects


def directive(state: State, node: Node) -> Directive:
    """All wishes to one node."""
    assert node.report is not None
    found = (_wish(state, job, node) for _, job in sorted(state.jobs.items()))
    return Directive(node.report.sequence, tuple(wish for wish in found if wish is not None))


def wish(job: Job) -> tuple[object, ...]:
    """What of a job its directives depend on; equal wishes need no new directives."""
    schedule = _on_the_wire(job.schedule) if job.schedule is not None else None
    return (
        job.spec, job.phase, job.roster, job.plan, job.stop_through, schedule, job.waiting_for, job.incident
    )  # fmt: skip


def _wish(state: State, job: Job, node: Node) -> JobDirective | None:
    facts = node.facts(job.spec.job)
    base = JobDirective(job.spec.job, job.spec, stop_through=job.stop_through)
    member = job.roster is not None and job.roster.member(node.name) is not None
    if not member:
        if facts is not None and (facts.generation or job.phase == FINISHED):
            # It was a member: it learns the new membership, that its trainers must go, and when
            # what it still holds is needed no more.
            passed = _on_the_wire(job.schedule) if job.schedule is not None else None
            return replace(base, roster=job.roster, schedule=passed, finished=job.phase == FINISHED)
        waits = job.phase in (FORMING, PLANNING)
        return replace(base, waiting_for=job.waiting_for) if waits else None
    assert job.roster is not None
    generation = job.roster.generation
    running = facts is not None and facts.running_generation == generation
    transfer = start = None
    if job.plan is not None:
        if job.phase in (TRANSFERRING, STARTING) and not running:
            transfer = job.plan.order(node.name)
        if job.phase in (STARTING, RUNNING, ADOPTING) and job.plan.master_host:
            start = StartOrder(generation, job.plan.master_host, job.plan.master_port)
    schedule = _on_the_wire(job.schedule) if job.schedule is not None else None
    if schedule is not None and job.phase in (INCIDENT, PLANNING):
        # Whoever waits for protection need not: nothing more comes in this generation.
        schedule = replace(schedule, paused="the job is being recovered")
    return replace(
        base,
        roster=job.roster,
        transfer=transfer,
        start=start,
        schedule=schedule,
        finished=job.phase == FINISHED,
        waiting_for=job.waiting_for,
    )


def _on_the_wire(schedule: Schedule) -> Schedule:
    """The schedule without what only its computation needs."""
    return replace(schedule, named_through=0, margin_steps=0, calm_steps=0)


def status_of(state: State, node: Node) -> str:
    """The node's state as the wire names it."""
    return detector.status(node, membership(state, node.name))


def membership(state: State, name: str) -> Job | None:
    """The unfinished job that this node is a member of."""
    for job in state.jobs.values():
        if job.phase != FINISHED and job.roster is not None and job.roster.member(name) is not None:
            return job
    return None
