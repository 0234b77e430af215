"""What the demo is asked to do, and the relations that must hold between its options."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from ckptd.errors import CkptdError, InvalidRequest

KILLS = ("none", "rank", "node", "node-silent", "two-nodes", "daemon", "coordinator")

NODES_MAX = 32

# The strike falls at a random time in the STRIKE_WINDOW_STEPS that follow WARMUP_STEPS completed steps.
WARMUP_STEPS = 8
STRIKE_WINDOW_STEPS = 4.0
# Room for a second strike (and what happens in between), and for going on afterwards.
STEPS_MIN = {"none": 2, "daemon": 40, "coordinator": 40, "node-silent": 30}
STEPS_MIN_OTHERWISE = 20


class DemoFailed(CkptdError):
    """A part of the demo ended or behaved as it must not; the message says which, and shows its log."""

    # The log that tells most, if any.
    log: Path | None = None

    @classmethod
    def of(cls, what: str, why: str, log: Path) -> DemoFailed:
        """The failure of a process that wrote `log`."""
        error = cls(what, why)
        error.log = log
        return error


@dataclass(frozen=True)
class DemoOptions:
    """Options of `ckptd demo`; `None` means the kind's default."""

    kill: str = "node"
    nodes: int = 4
    spares: int | None = None
    parity: int | None = None
    steps: int = 50
    seed: int | None = None
    # How the result is printed, which is the command line's part.
    # A directory in which results of the control are kept and found again.
    control_cache: Path | None = None
    # Fork trainers from an interpreter with torch imported; `restart_s` then says little.
    fork_server: bool = False

    def resolved(self) -> ResolvedOptions:
        """Every value decided and checked.

        Raises:
            InvalidRequest: unknown kind, or numbers that cannot work together.
        """
        lost = 2 if self.kill == "two-nodes" else 1
        chosen = ResolvedOptions(
            kill=self.kill,
            nodes=self.nodes,
            spares=max(lost, 1 if self.spares is None else self.spares),
            parity=max(lost, 1 if self.parity is None else self.parity),
            steps=self.steps,
            seed=secrets.randbelow(1_000_000) if self.seed is None else self.seed,
            control_cache=self.control_cache,
            fork_server=self.fork_server,
        )
        chosen.check()
        return chosen


@dataclass(frozen=True)
class ResolvedOptions:
    """Options of one demo, complete."""

    kill: str
    nodes: int
    spares: int
    parity: int
    steps: int
    seed: int
    control_cache: Path | None
    fork_server: bool

    def check(self) -> None:
        """Raises InvalidRequest where the demo could not do what is asked."""
        if self.kill not in KILLS:
            raise InvalidRequest(f"no such kill: {self.kill!r}", next=f"choose one of {', '.join(KILLS)}")
        if not self.parity < self.nodes <= NODES_MAX:
            raise InvalidRequest(
                f"--nodes {self.nodes} with --parity {self.parity}",
                f"{self.parity} lost nodes are rebuilt from the others: more than {self.parity} "
                f"and at most {NODES_MAX} nodes are needed",
            )
        if not 0 <= self.spares <= NODES_MAX:
            raise InvalidRequest(f"--spares {self.spares}", f"between 0 and {NODES_MAX} are possible")
        if not 0 <= self.seed < 1 << 32:
            raise InvalidRequest(f"--seed {self.seed}", "a seed lies between 0 and 4294967295")
        least = STEPS_MIN.get(self.kill, STEPS_MIN_OTHERWISE)
        if self.steps < least:
            raise InvalidRequest(
                f"--steps {self.steps}",
                f"--kill {self.kill} needs at least {least} steps, so that the job still runs afterwards",
            )
