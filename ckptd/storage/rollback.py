"""Going back to a stored step: a new generation whose line begins there.  Nothing is removed."""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.errors import InvalidRequest, NotFound
from ckptd.storage import catalog
from ckptd.storage.lines import MAX_REASON, Key, Start


@dataclass(frozen=True, slots=True)
class Rollback:
    """A rollback that was planned."""

    store: str
    job: str
    start: Start
    left: tuple[Key, ...]  # the checkpoints of the newest line that are left, the newest first


def plan(
    store: str, job: str, step: int, reason: str, now: float, *, generation: int | None = None
) -> Rollback:
    """Returns the rollback of a job to a stored step.

    Args:
        generation: of the checkpoint; by default that of the newest line, or the newest that has the step.

    Raises:
        NotFound: there is no such checkpoint.
        InvalidRequest: its parts are not in place, or the reason is empty or too long.
    """
    if not reason.strip() or len(reason) > MAX_REASON:
        raise InvalidRequest(
            f"the reason has {len(reason)} characters", f"1 to {MAX_REASON} are kept", "pass --reason TEXT"
        )
    known = catalog.survey(store, job)
    newest = known.lines.newest
    fitting = [key for key in known.heads if key[1] == step and generation in (None, key[0])]
    if not fitting:
        there = ", ".join(str(key[1]) for key in newest[:8]) or "none"
        raise NotFound(
            f"no checkpoint of step {step} of job {job} in {store}",
            f"its newest line has the steps {there}",
            f"ckptd ls {job} shows all",
        )
    parent = max(fitting, key=lambda key: (key in newest, key))
    why = catalog.why_not(known.store, catalog.entry_of(parent))
    if why is not None:
        raise InvalidRequest(
            f"nothing can resume from step {step}.g{parent[0]}",
            why,
            f"ckptd verify {job}/step-{step} --repair",
        )
    start = Start(catalog.generations(store, job).newest + 1, parent, reason, int(now))
    kept = set(known.lines.path(parent))
    return Rollback(store, job, start, tuple(key for key in newest if key not in kept))


def execute(rollback: Rollback) -> None:
    """Begins the line; durable when this returns.

    Raises:
        AlreadyThere: another rollback was first.
    """
    inside = catalog.job_store(rollback.store, rollback.job).inside(catalog.STARTS)
    inside.put_if_absent(catalog.start_name(rollback.start.generation), rollback.start.write(rollback.job))
