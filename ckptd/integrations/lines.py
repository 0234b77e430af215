"""Which generation a checkpoint belongs to whose writer knows no generations."""

from __future__ import annotations

from ckptd.storage.lines import Key, Lines


def generation_for(known: Lines, step: int) -> int:
    """Returns the generation in which step `step` of a job is saved, given the job's lines.

    It is the newest one, which may begin with a rollback; or, where that is at this step or beyond, the next:
    going back starts a new line, in which steps grow again.  All processes that write one checkpoint find the
    same, since it is not there before all of them have written.
    """
    tip, newest = known.tip, known.generation
    return newest + (tip is not None and tip[0] == newest and tip[1] >= step)


def parent_in(known: Lines, step: int, generation: int) -> Key | None:
    """Returns (generation, step) of the checkpoint before `step` in its line; None where none is known."""
    return known.at_most((generation, step - 1)) if generation <= known.generation else None
