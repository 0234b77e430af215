"""Which generation a checkpoint belongs to whose writer knows no generations."""

from __future__ import annotations

from collections.abc import Iterable

from ckptd.storage.catalog import Entry


def generation_for(entries: Iterable[Entry], step: int) -> int:
    """Returns the generation in which step `step` of a job is saved, given the job's checkpoints.

    It is the newest one; or, where that is at this step or beyond, the next: going back starts a new line, in
    which steps grow again.  All processes that write one checkpoint find the same, since it is not there
    before all of them have written.
    """
    known = list(entries)
    newest = max((entry.generation for entry in known), default=0)
    return newest + any(entry.generation == newest and entry.step >= step for entry in known)


def parent_in(entries: Iterable[Entry], step: int, generation: int) -> tuple[int, int] | None:
    """Returns (generation, step) of the checkpoint before `step` in its line; None where there is none."""
    before = [entry.step for entry in entries if entry.generation == generation and entry.step < step]
    return (generation, max(before)) if before else None
