"""Which node takes which ranks: the cheapest assignment in bytes moved.

A seat is a block of ranks that lives on one node.  Survivors keep their seats; a
spare takes a lost one.  Among equally cheap answers the one that crowds failure
domains least wins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

# Lexicographic: a survivor that would move, MiB, crowding, a seat that changes hands.
# Below 2**53, so that the sums are exact for hundreds of seats of a TiB each.
_MOVED_SURVIVOR = 2.0**44
_DOUBTFUL = 2.0**43
_MIB = 1 << 20


@dataclass(frozen=True)
class Seat:
    """A block of ranks, and the node that had it last ("" if none)."""

    ranks: tuple[int, ...]
    incumbent: str = ""


@dataclass(frozen=True)
class Candidate:
    """A living node, and the bytes that each seat would move to it (one entry per seat)."""

    node: str
    domain: str
    moved_bytes: tuple[int, ...]
    # It failed a transfer of this incident: it gets a seat only where nobody else is left.
    doubtful: bool = False


def assign(seats: Sequence[Seat], candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """The node for every seat, in the seats' order.

    Raises: ValueError: fewer candidates than seats, or a price list of another length.
    """
    if len(candidates) < len(seats):
        raise ValueError(f"{len(seats)} seats need as many nodes; found {len(candidates)}")
    for candidate in candidates:
        if len(candidate.moved_bytes) != len(seats):
            prices = len(candidate.moved_bytes)
            raise ValueError(f"{candidate.node} has {prices} prices for {len(seats)} seats")
    if not seats:
        return ()
    incumbents = {seat.incumbent for seat in seats}
    # An empty domain means the node's own, which nobody else shares.
    crowd = Counter(c.domain for c in candidates if c.node in incumbents and c.domain)
    cost = np.zeros((len(seats), len(candidates)))
    for column, candidate in enumerate(candidates):
        for row, seat in enumerate(seats):
            crowding = 0 if candidate.node in incumbents else crowd[candidate.domain]
            value = -(-candidate.moved_bytes[row] // _MIB) * 2.0**12 + min(crowding, 255) * 2.0**4
            if candidate.node != seat.incumbent:
                value += 1 + (_MOVED_SURVIVOR if candidate.node in incumbents else 0)
            if candidate.doubtful:
                value += _DOUBTFUL
            cost[row, column] = value
    rows, columns = linear_sum_assignment(cost)
    chosen = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return tuple(candidates[chosen[row]].node for row in range(len(seats)))
