"""What this rank knows of the job's schedule, and what follows from it.  Pure: no clock, no I/O."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ckptd.v1 import common_pb2, local_pb2

_REMEMBERED_STEPS = 1024


class Verdict(enum.Enum):
    """What to do with a step that was just completed."""

    CAPTURE = "capture"
    NO_SLOT = "no free slot"  # it is due, but there is no grant
    NOT_DUE = "not due"
    UNKNOWN = "unknown"  # the schedule does not reach so far yet


@dataclass(slots=True)
class ScheduleView:
    """The newest schedule and the grants of one rank."""

    generation: int
    floor: int = 0  # where this run began: counts as protected until a watermark exists
    schedule: common_pb2.Schedule = field(default_factory=common_pb2.Schedule)
    known: bool = False
    grants: dict[int, int] = field(default_factory=dict)  # step -> slot
    # What this rank did with its steps, as far back as anybody may ask: captured, or given up.
    captured: set[int] = field(default_factory=set)
    given_up: set[int] = field(default_factory=set)

    @property
    def watermark(self) -> int:
        """Newest step that is known to be protected."""
        return max(self.floor, self.schedule.watermark) if self.schedule.has_watermark else self.floor

    @property
    def standing(self) -> str:
        """Why nothing becomes protected for now, or an empty string."""
        return self.schedule.paused or ("a loss is not finite" if self.schedule.held else "")

    def update(self, message: local_pb2.Grants) -> None:
        """Takes over a message; one of another generation changes nothing."""
        if message.schedule.generation not in (0, self.generation):
            return
        before = self.watermark
        self.schedule = message.schedule
        if self.watermark < before:  # only grows within a generation
            self.schedule.watermark, self.schedule.has_watermark = before, True
        self.known = True
        self.grants = {grant.step: grant.slot for grant in message.grants}
        forgotten = self._forgotten
        for steps in (self.captured, self.given_up):
            steps.difference_update([step for step in steps if step <= forgotten])

    @property
    def _forgotten(self) -> int:
        """Up to here, nothing is known any more of what this rank did."""
        return self.watermark - _REMEMBERED_STEPS

    def forget_grants(self) -> None:
        """Called when the arena is another one: slots of the old one mean nothing."""
        self.grants.clear()

    def start_over(self) -> None:
        """Called when the daemon came back without its memory: what was captured here is gone."""
        self.schedule = common_pb2.Schedule()
        self.known = False
        self.grants.clear()
        self.captured.clear()

    def verdict(self, step: int) -> Verdict:
        """Returns what is to be done with `step`."""
        if step in self.grants:
            return Verdict.CAPTURE
        due = self.schedule.due
        if not self.known:
            return Verdict.UNKNOWN
        if step in self.schedule.aborted or step in self.given_up:
            return Verdict.NOT_DUE
        if step in due:
            return Verdict.NO_SLOT
        if self.standing or (due and step < max(due)):
            return Verdict.NOT_DUE
        return Verdict.UNKNOWN

    def missed(self, step: int) -> list[int]:
        """Returns due steps up to `step` that this rank ran past; each is to be given up, once.

        A daemon that was away may name steps that others know to be protected: a step
        that this rank captured is never given up here.
        """
        passed = [due for due in self.schedule.due if self._forgotten < due <= step and due != self.floor]
        known = (self.captured, self.given_up, self.schedule.aborted)
        return [due for due in passed if not any(due in steps for steps in known)]

    def lag(self, step: int) -> int:
        """Returns how many completed steps are unprotected when `step` is the newest completed one."""
        return step - self.watermark

    def may_advance(self) -> bool:
        """Whether the watermark can grow without another step of this rank."""
        if self.standing:
            return False
        watermark, given_up = self.watermark, self.given_up.union(self.schedule.aborted)
        return any(step > watermark and step not in given_up for step in self.captured)
