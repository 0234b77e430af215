"""What is due to be captured and how far protection has come, as a pure function of facts.

The coordinator computes it from the reports; while it is away the lowest reachable
daemon of the roster does, from the same facts with this same function.  Facts only
grow within a generation, so two parties that compute it are early or late, never wrong.

    step      8        9        10       11        12
              free     water-   due:     due:      named when 10
                       mark     folding  capturing is protected
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ckptd.v1 import common_pb2, coordinator_pb2

# A step named too late is given up by the whole job; naming further ahead costs a gap of
# as many steps.  The margin doubles with every late step and halves after so many good ones.
MAX_MARGIN_STEPS = 16
CALM_STEPS = 8
# Steps given up are told until the watermark passes them, and no more than these.
MAX_ABORTED = 32


@dataclass(frozen=True)
class NodeFacts:
    """What one node says about one generation.  Steps are completed optimizer steps."""

    node: str
    generation: int
    # Newest completed step of each rank that ever attached.
    completed: Mapping[int, int] = field(default_factory=dict)
    # All ranks of this node live and can capture.
    ready: bool = False
    # Steps whose parity here holds all contributions; they stay until the watermark passes them.
    folded: frozenset[int] = frozenset()
    # Steps of which anything at all is held here: captured, sealed or folded.
    begun: frozenset[int] = frozenset()
    aborted: frozenset[int] = frozenset()
    held: bool = False
    watermark: int | None = None
    unreachable: tuple[str, ...] = ()
    # Steps between background flushes that this node's settings ask for; 0: none.
    flush_every: int = 0
    # Newest step whose background flush is over here, well or not.
    flush_over: int = 0
    # This node was told to end.
    leaving: bool = False


@dataclass(frozen=True)
class Schedule:
    """The wire's Schedule, and what its next computation needs to know besides."""

    generation: int
    # None: nothing of this generation is protected yet.
    watermark: int | None = None
    # Invariant: ascending, all newer than the watermark and than the generation's start.
    due: tuple[int, ...] = ()
    held: bool = False
    # Why protection is paused; trainers that wait for it go on.
    paused: str = ""
    aborted: tuple[int, ...] = ()
    # The step that all nodes make durable in the background; 0: none.
    flush: int = 0
    # Which nodes are about to end, for people; empty: none.
    stopping: str = ""
    # Not on the wire.  Newest step that was ever chosen for that.
    flushed_through: int = 0
    # Not on the wire.  Invariant: no step up to this one is ever named again.
    named_through: int = 0
    margin_steps: int = 0
    calm_steps: int = 0


def next_schedule(
    previous: Schedule | None,
    *,
    generation: int,
    start_step: int,
    members: Sequence[str],
    facts: Iterable[NodeFacts],
    every: int,
    slots: int,
    away: Mapping[str, str] | None = None,
) -> Schedule:
    """The schedule that follows from `previous` and everybody's newest facts.

    The watermark is the newest step folded on every member, or any newer one that a
    node already knows; it never decreases within a generation.  Due are multiples of
    `every`; at most slots - 1 are outstanding, because the watermark's own slot must
    stay; a newly named one is strictly in the future of every rank.

    Args:
        previous: the schedule in force, None where the computing party has none.
        start_step: the step that this generation resumed from; 0 for a fresh start.
        members: the nodes of its roster.
        facts: of members, at most one each; facts of other generations do not count.
        every: capture every N completed steps.
        slots: places per rank, 2 or more.
        away: members whose facts are not fresh, and why.

    Raises: ValueError: every < 1 or slots < 2.
    """
    if every < 1 or slots < 2:
        raise ValueError(f"every must be 1 or more and slots 2 or more; found {every} and {slots}")
    roster = frozenset(members)
    known = {f.node: f for f in facts if f.generation == generation and f.node in roster}
    old = previous if previous is not None and previous.generation == generation else Schedule(generation)
    missing = [node for node in members if node not in known]

    watermark = _watermark(old.watermark, list(known.values()), complete=not missing)
    floor = max(start_step, watermark if watermark is not None else 0)
    reported = {step for f in known.values() for step in f.aborted if step > floor}
    aborted = tuple(sorted(s for s in reported | set(old.aborted) if s > floor))[-MAX_ABORTED:]
    # A step that is begun anywhere is due, whoever named it: a party that takes over from
    # another one must not give up what the other one named.
    begun = {step for f in known.values() for step in f.begun}
    due = {s for s in begun | set(old.due) if s > floor} - reported - set(old.aborted)
    held = any(f.held for f in known.values())
    named_through = max([old.named_through, floor, *due, *reported])
    margin, calm = _margin(old, watermark, late=bool(reported & set(old.due)) and not held)

    if held:
        due = set()
    elif not missing and all(f.ready for f in known.values()):
        completed = max((step for f in known.values() for step in f.completed.values()), default=0)
        for _ in range(slots - 1 - len(due)):
            # completed + 1 is the first step that every rank can still capture.
            named_through = _next_multiple(max(named_through, completed + margin), every)
            due.add(named_through)
    named = sorted(due - set(old.due))
    flush = 0 if missing else _flush(old, named, list(known.values()), start_step, watermark)
    return Schedule(
        generation=generation,
        watermark=watermark,
        due=tuple(sorted(due)),
        flush=flush,
        stopping=", ".join(f"node {f.node} is told to end" for f in known.values() if f.leaving),
        flushed_through=max(old.flushed_through, flush),
        held=held,
        paused=_paused(missing, away or {}, known.values()),
        aborted=aborted,
        named_through=named_through,
        margin_steps=margin,
        calm_steps=calm,
    )


def _watermark(old: int | None, known: Sequence[NodeFacts], *, complete: bool) -> int | None:
    candidates = [f.watermark for f in known if f.watermark is not None]
    if old is not None:
        candidates.append(old)
    if complete and known:
        candidates.extend(frozenset.intersection(*(f.folded for f in known)))
    return max(candidates, default=None)


def _flush(
    old: Schedule, named: Sequence[int], known: Sequence[NodeFacts], start_step: int, watermark: int | None
) -> int:
    """The step to be made durable: one at a time, and chosen when it is named.

    So every node knows of it before it is captured, and all of them write the same one.  Where a node is
    about to end, it is the watermark, which every node still holds; should a newer one overtake it, that
    one is next.
    """
    over = min((f.flush_over for f in known), default=0)
    given_up = any(old.flush in f.aborted for f in known)
    if old.flush > over and not given_up:
        return old.flush
    every = max((f.flush_every for f in known), default=0)
    if not all(f.flush_every for f in known) or not every:
        return 0
    last = max(old.flushed_through, over, start_step)
    if any(f.leaving for f in known):
        return watermark if watermark is not None and watermark > last else 0
    return next((step for step in named if step // every > last // every), 0)


def _margin(old: Schedule, watermark: int | None, *, late: bool) -> tuple[int, int]:
    """(margin, calm): how far beyond the newest completed step naming starts.

    The facts are as old as their way here, and the answer has a way back: a rank may be
    past a step when it hears of it.  How far, nobody knows beforehand, so a job that gives
    up steps for lateness has them named twice as far ahead, until they stay in time.
    """
    if late:
        return min(MAX_MARGIN_STEPS, max(1, 2 * old.margin_steps)), 0
    if watermark == old.watermark or not old.margin_steps:
        return old.margin_steps, old.calm_steps
    if old.calm_steps + 1 < CALM_STEPS:
        return old.margin_steps, old.calm_steps + 1
    return old.margin_steps // 2, 0


def _next_multiple(step: int, every: int) -> int:
    """The smallest multiple of `every` greater than `step`."""
    return (step // every + 1) * every


def _paused(missing: Sequence[str], away: Mapping[str, str], known: Iterable[NodeFacts]) -> str:
    reasons = [f"{node} {why}" for node, why in sorted(away.items())]
    reasons += [f"{node} has not taken up this generation" for node in missing if node not in away]
    for f in known:
        if f.unreachable and f.node not in away:
            reasons.append(f"{f.node} cannot reach {', '.join(f.unreachable)}")
    return "; ".join(reasons)


def facts_of(node: str, report: coordinator_pb2.JobReport) -> NodeFacts:
    """The facts of `node` in its report, about the report's own generation."""
    generation = report.generation
    mine = {t.rank: t for t in report.trainers if t.generation == generation}
    ranks = next((member.ranks for member in report.roster.members if member.node == node), ())
    holdings = [h for h in report.holdings if h.generation == generation]
    alive = coordinator_pb2.Trainer.ALIVE
    return NodeFacts(
        node=node,
        generation=generation,
        completed={rank: trainer.step for rank, trainer in mine.items()},
        ready=bool(ranks) and all(r in mine and mine[r].ready and mine[r].state == alive for r in ranks),
        folded=frozenset(h.step for h in holdings if h.folded),
        begun=frozenset(h.step for h in holdings),
        aborted=frozenset(report.aborted),
        held=report.held,
        watermark=report.watermark if report.has_watermark else None,
        unreachable=tuple(report.unreachable_peers),
        flush_every=report.flush_every,
        flush_over=report.flush_over,
        leaving=report.leaving,
    )


def to_message(schedule: Schedule) -> common_pb2.Schedule:
    """The schedule as it goes over the wire."""
    return common_pb2.Schedule(
        generation=schedule.generation,
        watermark=schedule.watermark or 0,
        has_watermark=schedule.watermark is not None,
        due=schedule.due,
        held=schedule.held,
        paused=schedule.paused,
        aborted=schedule.aborted,
        flush=schedule.flush,
        stopping=schedule.stopping,
    )


def from_message(message: common_pb2.Schedule) -> Schedule:
    """A schedule from the wire; its margin starts anew."""
    watermark = message.watermark if message.has_watermark else None
    return Schedule(
        generation=message.generation,
        watermark=watermark,
        due=tuple(message.due),
        held=message.held,
        paused=message.paused,
        aborted=tuple(message.aborted),
        flush=message.flush,
        stopping=message.stopping,
        flushed_through=message.flush,
        named_through=max([watermark or 0, *message.due, *message.aborted]),
    )
