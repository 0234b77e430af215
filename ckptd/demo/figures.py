"""From the coordinator's timeline, the killer's clock and the trainers' words to figures.  Pure.

All times are CLOCK_MONOTONIC of one machine.  A recovery is cut into phases that
touch each other: killed -> first alarm (detected), -> committed (planned: evidence
confirmed, old trainers stopped, plan made and journalled), -> transferred (moved and
verified), -> started -> first step of every rank (restart).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckptd.demo.history import History

# From cheap to dear; the demo names the dearest that any rank needed.
RUNGS = ("none", "own-memory", "replica", "parity")

# The coordinator has noticed that something is wrong.
ALARMS = ("node-suspect", "node-dead", "incident")


@dataclass(frozen=True)
class Event:
    """One line of the story, the coordinator's or the demo's own; further lines of `text` are details."""

    name: str
    at_s: float
    text: str


@dataclass(frozen=True)
class Recovery:
    """What one strike cost.  Seconds; `own_s` is ckptd's part: detect, plan, move, verify."""

    killed_at_step: int
    resumed_at_step: int
    lost_steps: int
    rung: str
    detected_s: float
    planned_s: float
    transferred_s: float
    restart_s: float
    resumed_s: float
    generation: int

    @property
    def own_s(self) -> float:
        return self.detected_s + self.planned_s + self.transferred_s


def recovery(events: Sequence[Event], history: History, struck_s: float, generation: int) -> Recovery | None:
    """The figures of the strike at `struck_s` in `generation`; None while the job is not back."""
    newer = [g for g in history.generations() if g > generation and history.first_step_s(g) is not None]
    if not newer:
        return None
    after, before = newer[0], history.completed(generation)
    resumed, back_s = history.resumed(after), history.first_step_s(after)
    assert before is not None, f"the strike fell into generation {generation}, which never ran"
    assert resumed is not None
    assert back_s is not None
    noticed = _first(events, struck_s, *ALARMS)
    committed = _first(events, noticed, "committed")
    transferred = _first(events, committed, "transferred")
    started = _first(events, transferred, "started")
    return Recovery(
        killed_at_step=before,
        resumed_at_step=resumed,
        lost_steps=before - resumed,
        rung=max(history.rungs(after), key=RUNGS.index),
        detected_s=noticed - struck_s,
        planned_s=committed - noticed,
        transferred_s=transferred - committed,
        restart_s=back_s - started,
        resumed_s=back_s - struck_s,
        generation=after,
    )


def timeline(events: Iterable[Event], struck_s: float | None) -> list[str]:
    """One line an event in order of time; seconds from the strike, or from the first event."""
    ordered = sorted(events, key=lambda event: event.at_s)
    if not ordered:
        return []
    zero_s = ordered[0].at_s if struck_s is None else struck_s
    return [line for event in ordered for line in _lines(event, zero_s)]


def _lines(event: Event, zero_s: float) -> list[str]:
    first, *more = event.text.splitlines() or [event.name]
    return [f"{event.at_s - zero_s:+9.3f} s  {first}", *(f"{'':13}{line}" for line in more)]


def _first(events: Iterable[Event], from_s: float, *names: str) -> float:
    """When one of `names` first happened at or after `from_s`."""
    times = [event.at_s for event in events if event.name in names and event.at_s >= from_s]
    assert times, f"the timeline has no {' or '.join(names)} after {from_s:.3f}"
    return min(times)


def combined_digest(digests: Mapping[int, Mapping[str, str]]) -> str:
    """One digest for all ranks and parts."""
    text = json.dumps([[rank, sorted(parts.items())] for rank, parts in sorted(digests.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def differences(
    final: Mapping[int, Mapping[str, str]],
    control: Mapping[int, Mapping[str, str]],
    losses: Mapping[int, Mapping[int, Iterable[str]]],
    control_losses: Mapping[int, Mapping[int, Iterable[str]]],
) -> list[str]:
    """What is not bit-identical, in words; empty when all is."""
    found = [
        f"rank {rank}: {part}"
        for rank in sorted(control)
        for part in sorted(control[rank])
        if final.get(rank, {}).get(part) != control[rank][part]
    ]
    if set(final) != set(control):
        found.append(f"ranks {sorted(final)} instead of {sorted(control)}")
    for rank in sorted(control_losses):
        told = losses.get(rank, {})
        wrong = [s for s, loss in sorted(control_losses[rank].items()) if set(told.get(s, ())) != set(loss)]
        if wrong:
            found.append(f"rank {rank}: the loss of {len(wrong)} steps, the first of them {wrong[0]}")
    return found
