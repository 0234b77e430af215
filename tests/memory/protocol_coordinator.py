"""The coordinator of the modelled job: what it remembers of reports, and the schedules it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from protocol_model import GENERATION, Bounds, Node, Nodes, Wire

from ckptd.memory.schedule import NodeFacts, Schedule, next_schedule, to_message


class Report(NamedTuple):
    """What the coordinator remembers of a node."""

    completed: int = 0
    folded: tuple[int, ...] = ()
    begun: tuple[int, ...] = ()
    aborted: tuple[int, ...] = ()
    watermark: int | None = None


class Coordinator(NamedTuple):
    """The schedule in force, and those published that may still be on their way to somebody."""

    schedule: Schedule | None = None
    published: tuple[Wire, ...] = ()
    # The newest watermark that was ever computed; here nobody forgets it.
    claimed: int | None = None
    # The newest completed step that any report named.
    completed: int = 0
    restarts: int = 0
    takeovers: int = 0


def report_of(nodes: Nodes, node: Node) -> Report:
    """What this node reports now."""
    facts = nodes.facts(node)
    return Report(
        max(facts.completed.values()),
        tuple(sorted(facts.folded)),
        tuple(sorted(facts.begun)),
        tuple(sorted(facts.aborted)),
        facts.watermark,
    )


def hear(bounds: Bounds, before: Coordinator, others: Sequence[Report | None], report: Report) -> Coordinator:
    """The coordinator after it heard one node, and computed the schedule from that and what it knew.

    Args:
        others: what it remembers of the other nodes, in any order: the rules know no names.
    """
    completed = max(before.completed, report.completed)
    names = [f"n{number}" for number in range(len(others) + 1)]
    facts = [
        NodeFacts(
            name,
            GENERATION,
            {0: told.completed if bounds.exact else completed},
            ready=True,
            folded=frozenset(told.folded),
            begun=frozenset(told.begun),
            aborted=frozenset(told.aborted),
            watermark=told.watermark,
        )
        for name, told in zip(names, (report, *others), strict=True)
        if told is not None
    ]
    schedule = next_schedule(
        before.schedule,
        generation=GENERATION,
        start_step=0,
        members=names,
        facts=facts,
        every=1,
        slots=bounds.slots,
    )
    wire = wire_of(schedule)
    return before._replace(
        schedule=schedule,
        published=before.published if wire in before.published else (*before.published, wire),
        claimed=max((m for m in (before.claimed, schedule.watermark) if m is not None), default=None),
        completed=completed,
    )


def remembered(bounds: Bounds, report: Report | None, schedule: Schedule | None) -> Report | None:
    """What can still matter of a report once `schedule` was computed from it.

    A step that was begun or given up is in the schedule from then on, and a folded one
    counts only above the watermark, which never decreases.  The newest completed step is
    kept by the coordinator for all together.
    """
    if report is None or bounds.exact:
        return report
    mark = schedule.watermark if schedule is not None else None
    return Report(folded=tuple(step for step in report.folded if mark is None or step > mark))


def mark_of(coordinator: Coordinator) -> int | None:
    """The watermark that the coordinator knows."""
    return coordinator.schedule.watermark if coordinator.schedule is not None else None


def wire_of(schedule: Schedule) -> Wire:
    """The schedule as a node gets it."""
    message = to_message(schedule)
    watermark = message.watermark if message.has_watermark else None
    return Wire(watermark, tuple(message.due), tuple(message.aborted))
