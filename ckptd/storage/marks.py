"""Small objects beside a manifest that say who needs a checkpoint: pins, readers' leases, and its removal.

    pinned                    somebody wants to keep it, and why
    lease-EXPIRY-RANDOM       somebody reads it until EXPIRY (seconds since 1970, UTC)
    doomed-TIME-RANDOM        a prune that began then removes it

A store has no locks, so both sides write first and look afterwards: a reader writes its lease and looks for
dooms, a prune writes its doom and looks for leases.  At least one of them sees the other.  Each takes back
nothing but its own mark; what one leaves that died counts until its time is over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from ckptd.errors import CkptdError, CorruptCheckpoint, InvalidRequest, NotFound
from ckptd.image.fields import Fields, MalformedField
from ckptd.image.manifest import MANIFEST_NAME
from ckptd.storage import place
from ckptd.storage.store import Store

log = logging.getLogger("ckptd.storage")

PIN: Final = "pinned"
LEASE_S: Final = 6 * 3600  # a reader that died keeps a checkpoint for so long
DOOM_S: Final = 3600  # a prune that takes longer for one checkpoint gives it up
MAX_REASON: Final = 1000  # characters
_LEASE: Final = re.compile(r"lease-([0-9]{12})-[0-9a-f]{16}")
_DOOM: Final = re.compile(r"doomed-([0-9]{12})-[0-9a-f]{16}")
_MAX_PIN_BYTES: Final = 16 << 10
_NUMBER: Final = 1 << 52


@dataclass(frozen=True, slots=True)
class Pin:
    """Why a checkpoint is kept, and since when."""

    reason: str
    time_s: int  # seconds since 1970, UTC


def pin(store: Store, reason: str, now: float) -> None:
    """Keeps the checkpoint in this directory from every prune; replaces an older pin.

    Raises:
        NotFound: there is no checkpoint.
        InvalidRequest: the reason is too long.
    """
    if len(reason) > MAX_REASON:
        raise InvalidRequest(f"the reason has {len(reason)} characters", f"at most {MAX_REASON} are kept")
    _check_there(store, now)
    text = json.dumps({"ckptd.pin": 1, "reason": reason, "time_s": int(now)}, separators=(",", ":"))
    store.put(PIN, [text.encode("ascii")])
    _check_there(store, now)  # a prune may have been faster


def unpin(store: Store) -> bool:
    """Returns whether there was a pin; now there is none."""
    there = PIN in store.list()
    store.delete(PIN)
    return there


def pin_of(store: Store) -> Pin:
    """Returns the pin of a checkpoint that has one.  One that cannot be read is a pin still.

    Raises:
        NotFound: there is none.
    """
    try:
        given = Fields(json.loads(store.read(PIN, _MAX_PIN_BYTES)), "the pin")
        given.one_of("ckptd.pin", (1,))
        found = Pin(given.text("reason", MAX_REASON), given.number("time_s", _NUMBER))
        given.done()
    except (MalformedField, CorruptCheckpoint, ValueError, RecursionError) as error:
        return Pin(f"(cannot be read: {error})", 0)
    return found


def leases(names: Iterable[str], now: float) -> tuple[list[str], list[str]]:
    """Returns the leases among the names of a directory's files: those that hold, and those that ended."""
    hold: list[str] = []
    ended: list[str] = []
    for name in names:
        found = _LEASE.fullmatch(name)
        if found is not None:
            (hold if int(found[1]) > now else ended).append(name)
    return hold, ended


def doom_name(now: float) -> str:
    """Returns a new name for the mark of a removal that begins now."""
    return f"doomed-{int(now):012}-{secrets.token_hex(8)}"


def is_doom(name: str) -> bool:
    """Whether a file is the mark of a removal."""
    return _DOOM.fullmatch(name) is not None


def doomed(names: Iterable[str], now: float) -> bool:
    """Whether one of a directory's files says that a prune may be removing the checkpoint at this moment."""
    found = (_DOOM.fullmatch(name) for name in names)
    return any(each is not None and now - int(each[1]) < DOOM_S for each in found)


@contextlib.contextmanager
def reading(store: Store, *, valid_s: float = LEASE_S) -> Iterator[None]:
    """Keeps the checkpoint in this directory from every prune while the block runs, `valid_s` at most.

    A store that cannot be written is read all the same: then nothing keeps it.

    Raises:
        NotFound: a prune removes it at this moment.
    """
    name = f"lease-{int(time.time() + valid_s) + 1:012}-{secrets.token_hex(8)}"
    try:
        store.put(name, [b""])
    except CkptdError as error:
        log.info("%s is read without a lease: %s", store.url, error)
        yield
        return
    try:
        names = store.list()
        if MANIFEST_NAME not in names or doomed(names, time.time()):
            raise NotFound(f"{store.url} is being removed", "a prune has begun", "choose another checkpoint")
        yield
    finally:
        with contextlib.suppress(CkptdError):  # it ends by itself
            store.delete(name)


def leased(store: Store, *, valid_s: float = LEASE_S) -> contextlib.AbstractContextManager[None]:
    """As `reading` where the directory is one that a prune may remove; nothing elsewhere."""
    prunable = place.parse_directory(store.url.rstrip("/").rpartition("/")[2]) is not None
    return reading(store, valid_s=valid_s) if prunable else contextlib.nullcontext()


def _check_there(store: Store, now: float) -> None:
    names = store.list()
    if MANIFEST_NAME not in names or doomed(names, now):
        raise NotFound(f"there is no checkpoint at {store.url}", next="ckptd ls shows what there is")
