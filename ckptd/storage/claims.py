"""A lock in a store that has no conditional put, made of files that are only put, listed and deleted.

Who wants the lock writes a claim and lists: it has the lock if no other claim is there, else it takes its own
back, waits, and tries again.  Where a list shows every file that was put before it began, two cannot both
find themselves alone.  A claim that stays the same for `lease_s` is of a writer that died, and is removed;
so a holder has to be done long before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from ckptd.errors import CkptdError, DeadlineExceeded
from ckptd.storage.retrying import Retrying

CLAIM_PREFIX: Final = ".ckptd-part-claim-"  # a scratch file's: no list of a store shows it
LEASE_S: Final = 60.0
_PAUSE_S: Final = 0.05


@dataclass(frozen=True)
class Place:
    """What a lock needs of a store's directory.  `names` lists everything, scratch files too."""

    put: Callable[[str], None]
    names: Callable[[], list[str]]
    delete: Callable[[str], None]


@contextlib.contextmanager
def held(
    where: Place, name: str, token: str, retrying: Retrying, *, lease_s: float = LEASE_S
) -> Iterator[Callable[[], None]]:
    """Yields a check, to be called right before what the lock is for: it fails if half the lease is over.

    Args:
        name: what is locked.
        token: of this attempt and no other.

    Raises:
        DeadlineExceeded: others have it, and do not let go; or the lease is over.
        CkptdError: as the store says.
    """
    prefix = f"{CLAIM_PREFIX}{name}-"
    mine = prefix + token
    end = retrying.clock() + lease_s + retrying.policy.total_s
    since: dict[str, float] = {}  # when each of the others' claims was seen first
    try:
        while True:
            began = retrying.clock()
            where.put(mine)
            others = {n for n in where.names() if n.startswith(prefix)} - {mine}
            if not others:
                break
            where.delete(mine)
            if retrying.clock() > end:
                raise DeadlineExceeded(
                    f"{name} cannot be locked",
                    f"{min(others)} is in the way",
                    "see who writes it, and try again",
                )
            _remove_dead(where, others, since, retrying.clock(), lease_s)
            retrying.sleep(_PAUSE_S + retrying.policy.first_pause_s * 4 * retrying.random())

        def check() -> None:
            if retrying.clock() - began > lease_s / 2:
                raise DeadlineExceeded(
                    f"{name} was locked too long", f"more than {lease_s / 2:g} s", "try again"
                )

        yield check
    finally:
        with contextlib.suppress(CkptdError):  # it expires
            where.delete(mine)


def _remove_dead(where: Place, others: set[str], since: dict[str, float], now: float, lease_s: float) -> None:
    for gone in set(since) - others:
        del since[gone]
    for claim in others:
        if now - since.setdefault(claim, now) > lease_s:
            where.delete(claim)
