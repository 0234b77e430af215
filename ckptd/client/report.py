"""What the client tells its user: frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Skipped:
    """A step that was captured but cannot be resumed, and why."""

    generation: int
    step: int
    why: str


@dataclass(frozen=True, slots=True)
class ResumeReport:
    """Where training continues: `for step in range(report.step, steps)`."""

    step: int  # completed optimizer steps; 0: a fresh start, nothing was loaded
    rung: str  # "none", "own-memory", "replica", "parity", "storage"
    verified: bool  # the bytes matched their digests before anything was loaded
    generation: int  # in which the loaded image was captured
    lost_steps: int | None = None  # completed steps to be done again; None: unknown
    layout_change: str | None = None  # None: the layout is what it was
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, slots=True)
class Statistics:
    """What happened so far; counts grow, nothing is reset."""

    step: int  # completed optimizer steps
    captured: int  # snapshots handed to the daemon
    dropped: Mapping[str, int]  # steps that `every` asked for and that were not captured, by reason
    voided: int  # snapshots whose audit found a moving tensor
    audits: int
    protected_step: int  # newest step known to be protected (a fresh start counts)
    lag_steps: int  # completed steps that are not
    blocked_s: float  # time that training spent in run.step(), fences and waits, seconds
    lag_wait_s: float  # the part of it that `max_lag` asked for
    copied_bytes: int
    replans: int  # plans after the first
    reconnects: int
    detached: bool  # no daemon at this moment: nothing is protected
    volatile: tuple[str, ...]  # tensors that an audit found moving

    @property
    def dropped_total(self) -> int:
        """Due steps that were not captured, whatever the reason."""
        return sum(self.dropped.values())
