"""The rungs of recovery and their prices, cheapest first.

Every way back is a rung with a price.  Reconstruction from neighbouring stages will stand below
these; whatever is added gets a name here and a price.  Storage has none here: no node is nearer to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from ckptd.memory.inventory import GroupState, Position


class Rung(StrEnum):
    """A way back; the values are the names that users see.  Declared cheapest first."""

    NONE = "none"
    OWN_MEMORY = "own-memory"
    REPLICA = "replica"
    PARITY = "parity"
    STORAGE = "storage"


@dataclass(frozen=True)
class Price:
    """What it takes to bring one position's image to one node."""

    rung: Rung
    # Over the network.
    moved_bytes: int


def price(state: GroupState, position: Position, node: str) -> Price:
    """The cheapest rung that brings `position`'s image to `node`."""
    if node in position.images:
        return Price(Rung.OWN_MEMORY, 0)
    nbytes = position.node_bytes or max((p.node_bytes for p in state.positions), default=0)
    if position.images or state.data_chunks == 1:
        # With one data chunk per stripe the code is mirroring: a parity chunk is the image.
        return Price(Rung.REPLICA, nbytes)
    return Price(Rung.PARITY, nbytes * state.data_chunks)


def steepest(rungs: Iterable[Rung]) -> Rung:
    """The most expensive rung of a plan: what the recovery as a whole is called."""
    order = list(Rung)
    return max(rungs, key=order.index, default=Rung.NONE)
