"""What the trainers said about their steps, and the questions that can be asked of it.  Pure.

Trainers write JSON lines (examples/gpt/loop.py): started, imported, built, begin,
step, kept, finished; `t` is CLOCK_MONOTONIC in seconds.  A step is counted when
optimizer.step() has returned on every rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

# The parts of starting a trainer, as (name, first event, last event).
STARTUP_PARTS = (
    ("imports", "started", "imported"),
    ("process group and model", "imported", "built"),
    ("state", "built", "begin"),
    ("first step", "begin", "step"),
)


@dataclass(frozen=True)
class CaptureTotals:
    """What capturing cost over all generations, of the rank where each is highest."""

    lag_steps_max: int
    dropped: int
    blocked_s: float


class History:
    """The records of `ranks` ranks over all generations."""

    def __init__(self, ranks: int) -> None:
        self.ranks = range(ranks)
        # generation -> rank -> completed step -> (time, loss)
        self._steps: dict[int, dict[int, dict[int, tuple[float, str]]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        # generation -> event -> rank -> record; the first "step" only, the newest of all others
        self._events: dict[int, dict[str, dict[int, Mapping[str, Any]]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        self._lag_steps_max = 0

    def add(self, generation: int, record: Mapping[str, Any]) -> None:
        """Takes one line of one trainer of `generation`.

        What an older generation still says counts for nothing: it is a process that was stopped
        and goes on, and nobody hears it.
        """
        if any(g > generation for g in self._events):
            return
        event, rank = str(record["event"]), int(record["rank"])
        events = self._events[generation][event]
        if event != "step" or rank not in events:
            events[rank] = record
        if event == "step":
            self._steps[generation][rank][int(record["step"])] = (float(record["t"]), str(record["loss"]))
        elif event == "kept":
            self._lag_steps_max = max(self._lag_steps_max, int(record["statistics"]["lag_steps"]))

    def generations(self) -> list[int]:
        """Generations of which anything was heard, ascending."""
        return sorted(self._events)

    def resumed(self, generation: int) -> int | None:
        """The step from which all ranks of `generation` went on; None before all did."""
        steps = {int(record["step"]) for record in self._all(generation, "begin") or ()}
        assert len(steps) <= 1, f"generation {generation} resumed from different steps: {sorted(steps)}"
        return steps.pop() if steps else None

    def completed(self, generation: int) -> int | None:
        """Optimizer steps completed by every rank of `generation`; None before all have resumed."""
        start = self.resumed(generation)
        if start is None:
            return None
        return min(max(self._steps[generation][rank], default=start) for rank in self.ranks)

    def reached(self) -> int:
        """Steps completed by every rank in the newest generation that resumed; 0 before."""
        return next(
            (step for g in reversed(self.generations()) if (step := self.completed(g)) is not None), 0
        )

    def first_step_s(self, generation: int) -> float | None:
        """When the slowest rank of `generation` had completed its first step; None before."""
        records = self._all(generation, "step")
        return max(float(record["t"]) for record in records) if records else None

    def rungs(self, generation: int) -> set[str]:
        """How the ranks of `generation` got their state."""
        return {str(record["rung"]) for record in self._all(generation, "begin") or ()}

    def loss(self, generation: int, step: int) -> float | None:
        """The mean of the ranks' losses of a completed step; None where a rank has not told."""
        told = [self._steps[generation][rank].get(step) for rank in self.ranks]
        losses = [float.fromhex(loss) for _, loss in (entry for entry in told if entry)]
        return sum(losses) / len(losses) if len(losses) == len(told) else None

    def last(self, rank: int) -> tuple[int, float] | None:
        """(step, loss) that this rank completed last, in the newest generation in which it completed any."""
        for generation in reversed(self.generations()):
            if steps := self._steps[generation][rank]:
                newest = max(steps)
                return newest, float.fromhex(steps[newest][1])
        return None

    def losses(self) -> dict[int, dict[int, set[str]]]:
        """rank -> step -> the exact losses told: one, unless a step done again came out differently."""
        told: dict[int, dict[int, set[str]]] = {rank: defaultdict(set) for rank in self.ranks}
        for ranks in self._steps.values():
            for rank, steps in ranks.items():
                for step, (_, loss) in steps.items():
                    told[rank][step].add(loss)
        return told

    def finished(self) -> dict[int, dict[str, str]] | None:
        """rank -> digests of its final state, once all ranks of one generation have finished."""
        for generation in reversed(self.generations()):
            if records := self._all(generation, "finished"):
                return {int(record["rank"]): dict(record["digests"]) for record in records}
        return None

    def step_s(self) -> float | None:
        """The median time of an optimizer step, first steps of a generation apart."""
        times = [
            [steps[step][0] for step in sorted(steps)[1:]]
            for ranks in self._steps.values()
            for steps in (ranks[0],)
        ]
        gaps = [later - earlier for told in times for earlier, later in pairwise(told)]
        return median(gaps) if gaps else None

    def capture_totals(self) -> CaptureTotals:
        """What capturing cost."""
        last = [
            [record["statistics"] for record in events["kept"].values()]
            for events in self._events.values()
            if "kept" in events
        ]
        return CaptureTotals(
            lag_steps_max=self._lag_steps_max,
            dropped=sum(max(sum(told["dropped"].values()) for told in ranks) for ranks in last),
            blocked_s=sum(max(float(told["blocked_s"]) for told in ranks) for ranks in last),
        )

    def startup(self, generation: int) -> dict[str, float]:
        """Where the time of starting `generation` went: the parts of the rank that was slowest in all."""
        events = self._events[generation]
        names = [first for _, first, _ in STARTUP_PARTS] + ["step"]
        if any(self._all(generation, name) is None for name in names):
            return {}
        slowest = max(self.ranks, key=lambda rank: float(events["step"][rank]["t"]))
        at = {name: float(events[name][slowest]["t"]) for name in names}
        return {part: at[last] - at[first] for part, first, last in STARTUP_PARTS}

    def _all(self, generation: int, event: str) -> list[Mapping[str, Any]] | None:
        """The records of all ranks in rank order, or None where one is missing."""
        if generation not in self._events:
            return None
        records = self._events[generation][event]
        return [records[rank] for rank in self.ranks] if len(records) == len(self.ranks) else None
