"""Which checkpoints stay: a plan that can be printed, then its execution.

    policy = Policy.parse("last=3,hourly=24,daily=7")
    made = plan(store, job, policy, now=time.time())
    execute(made, now=time.time)

Counted per line: an hour's or a day's checkpoint of one line says nothing of another's.  Whatever the
policy says, these stay: the checkpoint that a job would resume from, read and verified to the last byte; what
is newer and damaged, since a repair may bring it back; what is pinned; what is being read.

A removal writes its mark (`ckptd.storage.marks`), looks for readers, and deletes the manifest first: whoever
dies in between leaves no half of a checkpoint, but garbage, and the next prune takes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from ckptd.errors import CkptdError, InvalidRequest, NoSpace, NotFound
from ckptd.image.digest_table import TABLE_SUFFIX
from ckptd.image.manifest import MANIFEST_NAME
from ckptd.storage import catalog, marks
from ckptd.storage.lines import Key, Lines
from ckptd.storage.reading import open_checkpoint
from ckptd.storage.retrying import SILENT
from ckptd.storage.store import Store

GRACE_S: Final = 24 * 3600.0  # a directory without manifest that nobody wrote to for so long is garbage
_PERIODS: Final = {"hourly": "%Y-%m-%d %H", "daily": "%Y-%m-%d", "weekly": "%G-%V", "monthly": "%Y-%m"}
_MOST: Final = 1_000_000
_VERIFIED: Final = "newest verified"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Policy:
    """How many checkpoints of every line stay: the newest ones, and the newest of so many periods (UTC)."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Returns the policy that a text such as "last=3,hourly=24,daily=7" says.

        Raises:
            InvalidRequest: it says none, or keeps nothing.
        """
        found: dict[str, int] = {}
        for item in text.split(","):
            name, _, count = item.strip().partition("=")
            if name not in cls.__slots__ or name in found or not count.isascii() or not count.isdigit():
                raise InvalidRequest(
                    f"--keep cannot be read at {item!a}",
                    f"expected each of {', '.join(cls.__slots__)} at most once, with a number",
                    "for example --keep last=3,hourly=24,daily=7",
                )
            found[name] = min(int(count), _MOST)
        if not any(found.values()):
            raise InvalidRequest("--keep keeps nothing", f"found {text!a}", "keep at least last=1")
        return cls(**found)


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint that stays, and all reasons."""

    key: Key
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Garbage:
    """A directory without a manifest, to be removed."""

    key: Key
    why: str


@dataclass(frozen=True)
class Plan:
    """What a prune will do."""

    store: Store  # the job's directory
    keep: tuple[Kept, ...]  # the newest first
    remove: tuple[Key, ...]  # the oldest first
    garbage: tuple[Garbage, ...]


@dataclass
class Done:
    """What a prune did."""

    removed: list[Key] = field(default_factory=list)
    collected: list[Key] = field(default_factory=list)
    spared: list[Kept] = field(default_factory=list)  # somebody began to read them, or pinned them


def plan(
    store: str,
    job: str,
    policy: Policy,
    now: float,
    *,
    grace_s: float = GRACE_S,
    progress: Progress | None = None,
) -> Plan:
    """Returns what to keep and what to remove; reads the newest checkpoint whole, to know that it verifies.

    Raises:
        CkptdError: the store cannot be listed or read.
    """
    known = catalog.survey(store, job)
    why: dict[Key, list[str]] = {key: [] for key in known.heads}
    damaged = _mark_newest_verified(known, why, progress)
    times = {key: _time(known, key) for key in known.heads}
    for key, reasons in why.items():
        names = known.found[key].names
        if marks.PIN in names:
            reasons.append(f"pinned: {marks.pin_of(_inside(known.store, key)).reason}")
        if marks.leases(names, now)[0]:
            reasons.append("being read")
    if not any(_VERIFIED in reasons for reasons in why.values()):
        for reasons in why.values():
            reasons.append("none verifies")
    by_policy(known.lines, policy, times, why, skip=damaged)
    order = sorted(why, key=lambda key: (key[1], key[0]))
    keep = tuple(Kept(key, tuple(why[key])) for key in reversed(order) if why[key])
    return Plan(
        known.store,
        keep,
        tuple(key for key in order if not why[key]),
        tuple(_garbage(known, now, grace_s)),
    )


def by_policy(
    lines: Lines,
    policy: Policy,
    times: dict[Key, float],
    why: dict[Key, list[str]],
    skip: frozenset[Key] = frozenset(),
) -> None:
    """Adds to `why` for what the policy keeps; pure.

    Args:
        times: when each was written, seconds since 1970.
        skip: damaged ones, which do not count.
    """
    for line in lines.lines:
        own = [key for key in line.own if key not in skip]
        for key in own[: policy.last]:
            why[key].append("last")
        for period, form in _PERIODS.items():
            taken: set[str] = set()
            for key in own:
                label = datetime.fromtimestamp(times[key], UTC).strftime(form)
                if label not in taken and len(taken) < getattr(policy, period):
                    taken.add(label)
                    why[key].append(f"{period} {label}")


def execute(made: Plan, now: Callable[[], float], told: Callable[[str], None] = lambda _: None) -> Done:
    """Removes what the plan says, the oldest first.  May be called again after it was interrupted.

    Args:
        told: hears the directory before it is removed.

    Raises:
        CkptdError: the store refused; what was removed until then is gone, everything else is whole.
    """
    done = Done()
    for garbage in made.garbage:
        inside = _inside(made.store, garbage.key)
        told(inside.url)
        if MANIFEST_NAME in inside.list():  # it was published after all
            continue
        _clear(inside, now())
        done.collected.append(garbage.key)
    for key in made.remove:
        inside = _inside(made.store, key)
        told(inside.url)
        needed = remove(inside, now)
        if needed:
            done.spared.append(Kept(key, (needed,)))
        else:
            done.removed.append(key)
    return done


def remove(inside: Store, now: Callable[[], float]) -> str:
    """Removes the checkpoint in this directory, the manifest first.

    Returns:
        Why it was not removed after all; "" if it was.
    """
    began = now()
    mark = marks.doom_name(began)
    # A full disk must not keep anybody from making room on it; there, readers cannot write leases either.
    with contextlib.suppress(NoSpace):
        inside.put(mark, [b""])
    names = inside.list()
    needed = "being read" if marks.leases(names, now())[0] else "pinned" if marks.PIN in names else ""
    if not needed and now() - began > marks.DOOM_S / 2:  # readers may soon take the mark for a dead prune's
        needed = f"the store took {now() - began:.0f} s to answer"
    if needed:
        inside.delete(mark)
        return needed
    inside.delete(MANIFEST_NAME)  # from here on there is no checkpoint
    _clear(inside, now())
    return ""


def _clear(inside: Store, now: float) -> None:
    """Removes all files, the marks of removals last: they tell the next prune that these are garbage."""
    names = inside.list()
    for name in sorted(names, key=lambda name: (marks.is_doom(name), not name.endswith(TABLE_SUFFIX))):
        inside.delete(name)
    inside.remove(now - GRACE_S)


def _mark_newest_verified(
    known: catalog.Survey, why: dict[Key, list[str]], progress: Progress | None
) -> frozenset[Key]:
    """Finds the checkpoint that a job would resume from, and the newest of another tool's files.

    Returns:
        The newer ones, which are damaged.
    """
    damaged: set[Key] = set()
    verified: set[bool] = set()  # whether it holds another tool's files
    for key in known.lines.candidates:
        head = known.heads[key]
        files = head is not None and head.form == "files"
        if files in verified:
            continue
        if _verifies(_inside(known.store, key), key, progress):
            verified.add(files)
            why[key].append(_VERIFIED)
        else:
            damaged.add(key)
            why[key].append("damaged, may be repaired")
    return frozenset(damaged)


def _verifies(inside: Store, key: Key, progress: Progress | None) -> bool:
    try:
        with open_checkpoint(inside.url) as checkpoint:
            same = (checkpoint.manifest.generation, checkpoint.manifest.step) == key
            return same and not checkpoint.verify(progress)
    except SILENT:
        raise
    except CkptdError:
        return False


def _garbage(known: catalog.Survey, now: float, grace_s: float) -> Sequence[Garbage]:
    found = []
    for key, each in sorted(known.found.items()):
        if each.published:
            continue
        inside = _inside(known.store, key)
        if any(map(marks.is_doom, each.names)):
            found.append(Garbage(key, "left by a prune"))
        elif not marks.leases(each.names, now)[0] and now - inside.touched() > grace_s:
            found.append(Garbage(key, "left by a writer"))
    return found


def _time(known: catalog.Survey, key: Key) -> float:
    try:
        return _inside(known.store, key).modified(MANIFEST_NAME)
    except NotFound:  # removed meanwhile
        return 0.0


def _inside(root: Store, key: Key) -> Store:
    return root.inside(catalog.entry_of(key).directory)
