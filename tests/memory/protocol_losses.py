"""What recovery finds in a state of the modelled job, after every loss that the parity covers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from protocol_model import GENERATION, Bounds, Held, Nodes, Phase

from ckptd.memory.inventory import Choice, Fresh, HoldingFact, Unrecoverable, newest_recoverable

Found = Choice | Fresh | Unrecoverable
# What an inventory shows of one node: (step, sealed, folded) of each of its holdings.
Visible = tuple[tuple[int, bool, bool], ...]


class Worst(NamedTuple):
    """The worst that a loss can do.

    `step` is what recovery finds then, 0 for a fresh start, -1 for nothing.
    """

    step: int
    dead: tuple[int, ...]  # places in the roster's groups, counted through
    found: Found


class Losses:
    """Asks `newest_recoverable` after every loss of at most m nodes of each group."""

    def __init__(self, bounds: Bounds, nodes: Nodes) -> None:
        self._nodes = nodes
        self._places = [(g, i) for g in range(bounds.groups) for i in range(bounds.nodes)]
        self._sets = list(_losses(bounds))
        self.names = [name for group in nodes.groups for name in group]
        self.worst = functools.cache(self._worst)
        self._facts = functools.cache(self._facts_at)

    @property
    def inventories(self) -> int:
        """How many different inventories were judged, each after every loss."""
        return self.worst.cache_info().currsize

    @property
    def each(self) -> int:
        """How many losses there are, none at all included."""
        return len(self._sets)

    def _worst(self, seen: tuple[Visible, ...], ever_protected: bool) -> Worst:
        found = (self._after(seen, dead, ever_protected) for dead in self._sets)
        return min(found, key=lambda worst: (worst.step, len(worst.dead), worst.dead))

    def _after(self, seen: Sequence[Visible], dead: tuple[int, ...], ever_protected: bool) -> Worst:
        holdings = {
            name: self._facts(seen[place], *self._places[place])
            for place, name in enumerate(self.names)
            if place not in dead
        }
        found = newest_recoverable(
            holdings,
            range(len(self.names)),
            {GENERATION: self._nodes.roster},
            ever_protected=ever_protected,
        )
        step = found.snapshot.step if isinstance(found, Choice) else 0 if isinstance(found, Fresh) else -1
        return Worst(step, dead, found)

    def _facts_at(self, seen: Visible, group: int, index: int) -> list[HoldingFact]:
        held = [
            Held(step, Phase.SEALED if sealed else Phase.ABSENT, folded=folded)
            for step, sealed, folded in seen
        ]
        return self._nodes.inventory(held, group, index)


def visible(held: Sequence[Held]) -> Visible:
    """What an inventory shows of these holdings."""
    return tuple((h.step, h.phase is Phase.SEALED, h.folded) for h in held)


def _losses(bounds: Bounds) -> Iterator[tuple[int, ...]]:
    """Every set of places with at most m of each group."""
    in_one_group = [
        dead
        for count in range(bounds.parity + 1)
        for dead in itertools.combinations(range(bounds.nodes), count)
    ]
    for choice in itertools.product(in_one_group, repeat=bounds.groups):
        yield tuple(group * bounds.nodes + index for group, dead in enumerate(choice) for index in dead)
