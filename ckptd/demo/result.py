"""What the demo found out: the JSON object of `--json`, and the same as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptd.demo.figures import Recovery
from ckptd.demo.history import CaptureTotals

SCHEMA = "ckptd.demo/1"

# Figures of a recovery in the JSON object; null where nothing was killed.
RECOVERY_FIELDS = (
    "killed_at_step",
    "resumed_at_step",
    "lost_steps",
    "rung",
    "detected_s",
    "planned_s",
    "transferred_s",
    "restart_s",
    "resumed_s",
)


@dataclass(frozen=True)
class DemoResult:
    """The demo's figures, times in seconds.

    `recovery` is None where nothing was killed; for `daemon` and `coordinator` it is that
    of the node that was killed afterwards.
    """

    kill: str
    nodes: int
    parity: int
    seed: int
    steps: int
    recovery: Recovery | None
    # Median of an optimizer step.
    step_s: float
    capture: CaptureTotals
    final_digest: str
    control_digest: str
    # What is not bit-identical to the control, in words.
    different: tuple[str, ...] = ()
    timeline: tuple[str, ...] = ()
    # The parts of restart_s.
    startup: Mapping[str, float] = field(default_factory=dict)

    @property
    def identical(self) -> bool:
        """Whether every rank's final state and every loss on the way are the control's, bit for bit."""
        return not self.different and self.final_digest == self.control_digest

    @property
    def exit_code(self) -> int:
        """0 only if the job finished with the very bits of the control."""
        return 0 if self.identical else 1

    def to_json(self) -> str:
        """One line: the object of `ckptd demo --json`."""
        figures: dict[str, Any] = {
            "schema": SCHEMA,
            "kill": self.kill,
            "nodes": self.nodes,
            "parity": self.parity,
            "seed": self.seed,
            "steps": self.steps,
        }
        figures |= {name: getattr(self.recovery, name, None) for name in RECOVERY_FIELDS}
        figures |= {
            "step_s": self.step_s,
            "lag_steps_max": self.capture.lag_steps_max,
            "dropped": self.capture.dropped,
            "blocked_s": self.capture.blocked_s,
            "final_digest": self.final_digest,
            "control_digest": self.control_digest,
            "identical": self.identical,
        }
        return json.dumps(figures)

    def text(self) -> str:
        """The timeline, what it cost and the verdict, for people."""
        cost = self._cost(self.recovery) if self.recovery else []
        totals = (
            f"{self.step_s * 1e3:.0f} ms a step, at most {self.capture.lag_steps_max} steps not protected, "
            f"{self.capture.dropped} snapshots dropped, {self.capture.blocked_s:.2f} s waited for protection"
        )
        return "\n".join([*self.timeline, "", *cost, totals, "", self._verdict()])

    def _cost(self, back: Recovery) -> list[str]:
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in self.startup.items())
        return [
            f"killed at step {back.killed_at_step}, resumed at step {back.resumed_at_step}: "
            f"{back.lost_steps} completed steps done again, state from {back.rung}",
            f"{back.own_s:.3f} s of ckptd's own: detected {back.detected_s:.3f}, confirmed, stopped and "
            f"planned {back.planned_s:.3f}, moved and verified {back.transferred_s:.3f}",
            f"{back.restart_s:.2f} s of the trainers' start: {parts}",
            f"{back.resumed_s:.2f} s from the strike to the first step",
        ]

    def _verdict(self) -> str:
        if not self.identical:
            return "DIFFERENT from the uninterrupted control: " + "; ".join(self.different)
        return (
            f"IDENTICAL: after {self.steps} steps the weights and the optimizer state of all {self.nodes} "
            "ranks (and schedule, data position, random state, every loss)\n"
            f"are bit for bit those of the uninterrupted control. Digest {self.final_digest[:32]}"
        )
