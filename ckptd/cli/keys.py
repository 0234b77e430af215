"""How the commands name a checkpoint and its time: for people, and in JSON."""

from __future__ import annotations

from datetime import UTC, datetime

from ckptd.storage.lines import Key


def named(key: Key) -> str:
    """Step and generation, as the commands take them."""
    return f"step {key[1]}.g{key[0]}"


def fields(key: Key) -> dict[str, int]:
    """The same as JSON fields."""
    return {"step": key[1], "generation": key[0]}


def when(seconds: float) -> str:
    """Seconds since 1970 as date and time, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
