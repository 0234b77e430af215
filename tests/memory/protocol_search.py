"""Every reachable state of a small job, breadth first, so that the first counterexample is a shortest one.

Two reductions keep the search small; `Bounds.exact` turns both off, and a test compares the results:

- States that differ by the names of groups, or by a turn of a group's nodes, are one state:
  geometry and rules look the same from everywhere.
- Of a report the coordinator keeps what can still matter; see `protocol_coordinator.remembered`.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from protocol_coordinator import Coordinator, Report, hear, mark_of, remembered, report_of
from protocol_losses import Found, Losses, Visible, visible
from protocol_model import Bounds, Fault, Node, Nodes, Wire

from ckptd.memory.inventory import Choice

Value = TypeVar("Value", bound=Hashable)


class Cell(NamedTuple):
    """A node, and what the coordinator remembers of it; None where it heard nothing."""

    node: Node = Node()
    report: Report | None = None


class Move(NamedTuple):
    """Who does what; the peer is who it is done with."""

    place: int
    what: str
    peer: int | None = None


# A state: the number of its coordinator, and those of its cells in the order of the groups.
State = tuple[int, ...]


class Loss(NamedTuple):
    """A reachable state in which a loss leaves too little, and how it comes about."""

    trace: tuple[str, ...]
    dead: tuple[str, ...]
    claimed: int | None
    found: Found

    def __str__(self) -> str:
        lines = [f"{number:3}. {action}" for number, action in enumerate(self.trace, 1)]
        lines.append(f"{len(lines) + 1:3}. {' and '.join(self.dead) or 'nobody'} is lost")
        known = f"step {self.claimed} was protected" if self.claimed else "nothing was protected"
        found = f"step {self.found.snapshot.step}" if isinstance(self.found, Choice) else "no step"
        lines.append(f"     {known}; recovery finds {found} ({type(self.found).__name__})")
        lines += [f"     {refusal}" for refusal in self.found.refusals]
        return "\n".join(lines)


class Result(NamedTuple):
    """What a search found."""

    states: int
    transitions: int
    inventories: int  # different ones
    losses: int  # sets of nodes whose loss was tried on each of them
    watermarks: frozenset[int]
    # A protected step that cannot be had any more; the search ends there.
    loss: Loss | None
    # Recovery waits for the dead, although nothing was ever known to be protected.
    cautious: Loss | None
    # Ways to ends where a step is due and nothing can happen any more.
    stuck: tuple[tuple[str, ...], ...]
    # If asked for: the states without what the coordinator remembers, and what recovery sees of them.
    seen: frozenset[tuple[Wire, tuple[Node, ...]]]
    shown: frozenset[tuple[int | None, tuple[Visible, ...]]]

    def __str__(self) -> str:
        return (
            f"{self.states:,} states, {self.transitions:,} transitions, "
            f"{self.inventories:,} inventories x {self.losses} losses, watermarks {sorted(self.watermarks)}"
        )


class Search:
    """One exhaustive search within `bounds`.

    Args:
        directory: for the model's arena.
    """

    def __init__(self, bounds: Bounds, directory: Path) -> None:
        self.bounds = bounds
        self._nodes = Nodes(bounds, directory)
        self._losses = Losses(bounds, self._nodes)
        self._size = bounds.groups * bounds.nodes
        self._coordinators: list[Coordinator] = []
        self._coordinator_numbers: dict[Coordinator, int] = {}
        self._cells: list[Cell] = []
        self._cell_numbers: dict[Cell, int] = {}
        self._visible: list[Visible] = []
        self._visible_numbers: dict[Visible, int] = {}
        self._reports: list[Report | None] = []
        self._report_numbers: dict[Report | None, int] = {}
        # By the number of a cell: what an inventory shows of it, and the numbers of what it
        # reported and of what it would report now.
        self._shows: list[int] = []
        self._recalls: list[int] = []
        self._tells: list[int] = []
        self._own = functools.cache(self._own_moves)
        self._pair = functools.cache(self._pair_moves)
        self._urgent = functools.cache(self._urgent_move)
        self._news = functools.cache(self._news_moves)
        self._hear = functools.cache(self._heard)
        self._recall = functools.cache(self._recalled)
        self._trim = functools.cache(self._trimmed)
        self._judge = functools.cache(self._judged)
        self._turn = functools.cache(self._turned)

    def run(self, *, keep_seen: bool = False) -> Result:
        """All reachable states, or those before the first loss."""
        try:
            return self._run(keep_seen)
        finally:
            self._nodes.close()

    def _run(self, keep_seen: bool) -> Result:
        start = self._initial()
        parents: dict[State, State | None] = {start: None}
        frontier, transitions = [start], 0
        stuck: list[State] = []
        loss = cautious = None
        while frontier and loss is None:
            reached: list[State] = []
            for state in frontier:
                claimed = self._coordinators[state[0]].claimed
                if self._lowest(state) < (claimed or 0):
                    if claimed is not None:
                        loss = state
                        break
                    cautious = cautious or state
                ways = 0
                for _, successor in self._moves(state):
                    ways += 1
                    found = self._canonical(successor)
                    if found not in parents:
                        parents[found] = state
                        reached.append(found)
                transitions += ways
                if not ways and self._due(state):
                    stuck.append(state)
            frontier = reached
        return Result(
            states=len(parents),
            transitions=transitions,
            inventories=self._losses.inventories,
            losses=self._losses.each,
            watermarks=frozenset(c.claimed for c in self._coordinators if c.claimed is not None),
            loss=self._described(loss, parents) if loss is not None else None,
            cautious=self._described(cautious, parents) if cautious is not None else None,
            stuck=tuple(self._replay(state, parents)[0] for state in stuck[:3]),
            seen=frozenset(map(self._projected, parents)) if keep_seen else frozenset(),
            shown=frozenset(map(self._shown, parents)) if keep_seen else frozenset(),
        )

    def _lowest(self, state: State) -> int:
        """The step that recovery finds after the worst loss; names do not matter for that."""
        shown = self._sorted(tuple([self._shows[number] for number in state[1:]]))
        return self._judge(shown, self._coordinators[state[0]].claimed is not None)

    def _judged(self, shown: State, protected: bool) -> int:
        return self._losses.worst(tuple(self._visible[number] for number in shown), protected).step

    def _due(self, state: State) -> list[int]:
        """Steps within the bounds that are to be captured and protected yet."""
        schedule = self._coordinators[state[0]].schedule
        assert schedule is not None
        return [step for step in schedule.due if step <= self.bounds.steps]

    # Numbers

    def _cell(self, node: Node, report: Report | None) -> int:
        cell = Cell(node, report)
        number = self._cell_numbers.get(cell)
        if number is None:
            number = self._cell_numbers[cell] = len(self._cells)
            self._cells.append(cell)
            self._shows.append(_number(self._visible, self._visible_numbers, visible(node.held)))
            self._recalls.append(self._report(report))
            self._tells.append(self._report(report_of(self._nodes, node)))
        return number

    def _report(self, report: Report | None) -> int:
        return _number(self._reports, self._report_numbers, report)

    def _coordinator(self, coordinator: Coordinator) -> int:
        return _number(self._coordinators, self._coordinator_numbers, coordinator)

    def _canonical(self, state: State) -> State:
        """One of all states that differ by names only."""
        if self.bounds.exact:
            return state
        return (state[0], *self._sorted(state[1:]))

    def _sorted(self, numbers: State) -> State:
        n = self.bounds.nodes
        groups = [self._turn(numbers[at : at + n]) for at in range(0, len(numbers), n)]
        groups.sort()
        return tuple([number for group in groups for number in group])

    def _turned(self, group: State) -> State:
        return min(group[at:] + group[:at] for at in range(len(group)))

    def _projected(self, state: State) -> tuple[Wire, tuple[Node, ...]]:
        """A state without what the coordinator remembers, under names that do not depend on numbers."""
        nodes = [self._cells[number].node for number in state[1:]]
        return self._coordinators[state[0]].published[-1], _by_value(nodes, self.bounds.nodes)

    def _shown(self, state: State) -> tuple[int | None, tuple[Visible, ...]]:
        """What recovery sees of a state, and has to reach."""
        seen = [self._visible[self._shows[number]] for number in state[1:]]
        return self._coordinators[state[0]].claimed, _by_value(seen, self.bounds.nodes)

    # Moves

    def _initial(self) -> State:
        """Every node has reported that it did nothing yet, and knows the first schedule."""
        state = (self._coordinator(Coordinator()), *[self._cell(Node(), None)] * self._size)
        for place in range(1, self._size + 1):
            state = self._reported(state, place)
        coordinator = self._coordinators[state[0]]
        first = coordinator.published[-1]
        cells = [self._cells[number] for number in state[1:]]
        told = [self._cell(cell.node._replace(known=first), cell.report) for cell in cells]
        return (self._coordinator(coordinator._replace(published=(first,))), *told)

    def _moves(self, state: State) -> Iterator[tuple[Move, State]]:
        """Everything that can happen next; places count from 1, as in a state."""
        n = self.bounds.nodes
        if self.bounds.eager and (urgent := self._first_urgent(state)) is not None:
            yield urgent
            return
        for place in range(1, self._size + 1):
            cell, before, after = state[place], state[:place], state[place + 1 :]
            for what, number in self._own(cell):
                yield Move(place, what), (*before, number, *after)
            base = place - (place - 1) % n
            for distance in range(1, n):
                peer = base + (place - base + distance) % n
                for what, number in self._pair(cell, state[peer], distance):
                    yield Move(place, what, peer), (*before, number, *after)
            for what, number in self._news(state[0], cell):
                learned = (*before, number, *after)
                yield Move(place, what), self._forgotten(learned)
            reported = self._reported(state, place)
            if reported != state:
                yield Move(place, "reports"), reported
        if self.bounds.restarts or self.bounds.takeovers:
            yield from self._deaths(state)
        if self.bounds.fault is Fault.RELEASE_BY_GROUP:
            yield from self._group_releases(state)

    def _first_urgent(self, state: State) -> tuple[Move, State] | None:
        n = self.bounds.nodes
        for place in range(1, self._size + 1):
            base = place - (place - 1) % n
            for distance in range(1, n):
                peer = base + (place - base + distance) % n
                if (found := self._urgent(state[place], state[peer], distance)) is not None:
                    what, number = found
                    return Move(place, what, peer), (*state[:place], number, *state[place + 1 :])
        return None

    def _urgent_move(self, number: int, peer_number: int, distance: int) -> tuple[str, int] | None:
        (node, report), peer = self._cells[number], self._cells[peer_number].node
        found = self._nodes.urgent(node, peer, distance)
        return None if found is None else (found[0], self._cell(found[1], report))

    def _own_moves(self, number: int) -> list[tuple[str, int]]:
        node, report = self._cells[number]
        return [(what, self._cell(after, report)) for what, after in self._nodes.alone(node)]

    def _pair_moves(self, number: int, peer_number: int, distance: int) -> list[tuple[str, int]]:
        (node, report), peer = self._cells[number], self._cells[peer_number].node
        moves = list(self._nodes.from_peer(node, peer, distance))
        if self.bounds.aborts:
            moves += self._nodes.damaged(node, peer, distance)
        return [(what, self._cell(after, report)) for what, after in moves]

    def _news_moves(self, coordinator: int, number: int) -> list[tuple[str, int]]:
        """The schedules that may reach a node; in their order, unless the bounds say otherwise."""
        published, (node, report) = self._coordinators[coordinator].published, self._cells[number]
        first = 0 if self.bounds.reorder else published.index(node.known) + 1
        learned = [(wire, self._nodes.learn(node, wire)) for wire in published[first:]]
        return [
            (f"learns {_words(wire)}", self._cell(after, report)) for wire, after in learned if after != node
        ]

    def _forgotten(self, state: State) -> State:
        """The state without the schedules that no message can bring any more."""
        if self.bounds.reorder:
            return state
        return (self._trim(state[0], frozenset(state[1:])), *state[1:])

    def _trimmed(self, number: int, cells: frozenset[int]) -> int:
        coordinator = self._coordinators[number]
        oldest = min(coordinator.published.index(self._cells[cell].node.known) for cell in cells)
        return self._coordinator(coordinator._replace(published=coordinator.published[oldest:]))

    def _reported(self, state: State, place: int) -> State:
        """The coordinator hears a node, computes the schedule, and publishes it."""
        known = [self._recalls[number] for number in state[1:]]
        del known[place - 1]
        if not self.bounds.exact:
            known.sort()
        cell = state[place]
        heard, told, passed = self._hear(state[0], tuple(known), self._tells[cell])
        if heard == state[0] and told == self._recalls[cell]:
            return state
        cells = [self._recall(number, heard) for number in state[1:]] if passed else list(state[1:])
        cells[place - 1] = self._cell(self._cells[cell].node, self._reports[told])
        return (heard, *cells)

    def _heard(self, number: int, others: tuple[int, ...], told: int) -> tuple[int, int, bool]:
        """(the coordinator, what it remembers of the report, whether the watermark moved)."""
        before, report = self._coordinators[number], self._reports[told]
        assert report is not None
        after = hear(self.bounds, before, [self._reports[other] for other in others], report)
        kept = self._report(remembered(self.bounds, report, after.schedule))
        return self._coordinator(after), kept, mark_of(before) != mark_of(after)

    def _recalled(self, number: int, coordinator: int) -> int:
        node, report = self._cells[number]
        return self._cell(node, remembered(self.bounds, report, self._coordinators[coordinator].schedule))

    def _deaths(self, state: State) -> Iterator[tuple[Move, State]]:
        """New daemons, and new coordinators that have heard nothing yet."""
        coordinator = self._coordinators[state[0]]
        if coordinator.restarts < self.bounds.restarts:
            counted = self._coordinator(coordinator._replace(restarts=coordinator.restarts + 1))
            for place in range(1, self._size + 1):
                node, report = self._cells[state[place]]
                number = self._cell(self._nodes.restarted(node), report)
                yield (
                    Move(place, "gets a new daemon"),
                    (counted, *state[1:place], number, *state[place + 1 :]),
                )
        if coordinator.takeovers < self.bounds.takeovers:
            new = coordinator._replace(schedule=None, completed=0, takeovers=coordinator.takeovers + 1)
            cells = [self._cell(self._cells[number].node, None) for number in state[1:]]
            yield Move(0, "starts anew"), (self._coordinator(new), *cells)

    def _group_releases(self, state: State) -> Iterator[tuple[Move, State]]:
        """The deliberate fault: the newest step that the own group folded is taken for the watermark."""
        n = self.bounds.nodes
        for base in range(1, self._size + 1, n):
            cells = [self._cells[number] for number in state[base : base + n]]
            folded = frozenset.intersection(
                *(frozenset(h.step for h in c.node.held if h.folded) for c in cells)
            )
            for place, (node, report) in enumerate(cells, base):
                freed = self._nodes.released(node, max(folded, default=None))
                if freed != node:
                    number = self._cell(freed, report)
                    yield Move(place, "frees older steps"), (*state[:place], number, *state[place + 1 :])

    # Words

    def _described(self, state: State, parents: dict[State, State | None]) -> Loss:
        trace, end = self._replay(state, parents)
        claimed = self._coordinators[end[0]].claimed
        shown = tuple(self._visible[self._shows[number]] for number in end[1:])
        worst = self._losses.worst(shown, claimed is not None)
        return Loss(trace, tuple(self._losses.names[place] for place in worst.dead), claimed, worst.found)

    def _replay(self, state: State, parents: dict[State, State | None]) -> tuple[tuple[str, ...], State]:
        """A way from the start to this state, or to one that differs by names; and where it ends."""
        path = [state]
        while (parent := parents[path[-1]]) is not None:
            path.append(parent)
        at, trace = path.pop(), []
        for wanted in reversed(path):
            move, at = next(found for found in self._moves(at) if self._canonical(found[1]) == wanted)
            names = ["coordinator", *self._losses.names]
            peer = f" {names[move.peer]}" if move.peer is not None else ""
            trace.append(f"{names[move.place]} {move.what}{peer}")
        return tuple(trace), at


def _by_value(values: list[Value], n: int) -> tuple[Value, ...]:
    """Values of nodes in one order for all that differ by names only."""
    groups = [values[at : at + n] for at in range(0, len(values), n)]
    turned = [min((group[at:] + group[:at] for at in range(n)), key=repr) for group in groups]
    return tuple(value for group in sorted(turned, key=repr) for value in group)


def _number(values: list[Value], numbers: dict[Value, int], value: Value) -> int:
    """The number of a value, the next one where it is new."""
    number = numbers.setdefault(value, len(values))
    if number == len(values):
        values.append(value)
    return number


def _words(wire: Wire) -> str:
    told = [f"watermark {wire.watermark}"] if wire.watermark is not None else []
    told += [f"due {', '.join(map(str, wire.due))}"] if wire.due else []
    told += [f"given up {', '.join(map(str, wire.aborted))}"] if wire.aborted else []
    return "; ".join(told) or "that nothing is due"
