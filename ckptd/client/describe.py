"""Which tensor is in which class, for people."""

from __future__ import annotations

from collections.abc import Iterable

from ckptd.client.attached import with_own_saving
from ckptd.client.state import Entry, Survey

_NAMED_AT_MOST = 8


def describe(survey: Survey, moved: set[str]) -> str:
    """Returns a few lines: what is copied behind training, what at the cut, what no fence protects.

    Args:
        moved: names that an audit found moving.
    """
    entries = list(survey.entries.values())
    quiescent = [entry for entry in entries if entry.quiescent and entry.name not in moved]
    volatile = [entry for entry in entries if not entry.quiescent or entry.name in moved]
    ownerless = [entry for entry in quiescent if not entry.owners]
    lines = [
        f"{len(entries)} tensors of modules and optimizers, {_size(entries)}",
        f"  copied behind the next forward and backward: {len(quiescent)} ({_size(quiescent)})",
        f"  copied at run.step(): {len(volatile)} ({_size(volatile)})",
    ]
    lines[-1] += _named(entry.name for entry in volatile)
    if survey.aliases:
        lines.append(f"  other names of the same storage: {len(survey.aliases)}{_named(survey.aliases)}")
    if ownerless:
        names = _named(entry.name for entry in ownerless)
        lines.append(f"  of no attached torch optimizer, every fence waits for them: {len(ownerless)}{names}")
        lines.append("    (call run.fence() before anything else changes them, or use capture='eager')")
    own = with_own_saving(survey.attached)
    if own:
        lines.append(
            f"  modules whose own state_dict is not called, only tensors and extra state:{_named(own)}"
        )
    objects = survey.attached.objects
    lines.append(f"  objects: {', '.join(objects) or 'none'}; random states of torch, CUDA, numpy and random")
    return "\n".join(lines)


def _size(entries: Iterable[Entry]) -> str:
    return f"{sum(entry.tensor.nbytes for entry in entries):,} bytes"


def _named(names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return ""
    more = ", ..." if len(names) > _NAMED_AT_MOST else ""
    return f": {', '.join(names[:_NAMED_AT_MOST])}{more}"
