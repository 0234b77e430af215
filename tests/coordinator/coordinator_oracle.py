"""What must hold in the simulated world, whatever happens; it sees everything."""

from __future__ import annotations

from coordinator_node import SimNode

from ckptd.coordinator.state import State
from ckptd.erasure.groups import cut
from ckptd.memory.inventory import Roster, Snapshot


class Oracle:
    """Knows the truth about what was protected, and checks every new generation against it."""

    nodes: dict[str, SimNode]
    state: State | None
    now: float

    def __init__(self) -> None:
        self.rosters: dict[int, Roster] = {}
        # Which memory of a node (by its epoch) folded a step.
        self.folded: dict[Snapshot, dict[str, int]] = {}
        self.protected: tuple[Snapshot, dict[str, int]] | None = None
        self.protected_steps: list[tuple[float, int]] = []

    def now_protected(self, snapshot: Snapshot) -> None:
        """Somebody told somebody that this step is protected."""
        epochs = self.folded.get(snapshot, {})
        missing = set(self.rosters[snapshot.generation].nodes) - set(epochs)
        assert not missing, f"{snapshot} was called protected, and {missing} never folded it"
        if self.protected is not None and self.protected[0].generation == snapshot.generation:
            if self.protected[0].step >= snapshot.step:
                return
        elif snapshot.generation != max(self.rosters):
            return
        self.protected_steps.append((self.now, snapshot.step))
        self.protected = (snapshot, epochs)

    def content(self, generation: int, step: int) -> Snapshot:
        """Which generation really computed the state at `step` of this generation's line."""
        while (roster := self.rosters.get(generation)) is not None and step <= roster.start.step:
            if step == 0 or roster.start.generation == 0:
                return Snapshot()
            generation = roster.start.generation
        return Snapshot(generation, step)

    def losses(self) -> int:
        """The most members that a group of the newest protected step has lost, or cannot reach now."""
        if self.protected is None:
            return 0
        snapshot, epochs = self.protected
        roster = self.rosters[snapshot.generation]
        assert self.state is not None
        lost = 0
        for group in cut([(m.node, m.domain) for m in roster.members], roster.parity):
            gone = 0
            for name in group:
                known = self.state.nodes.get(name)
                reachable = known is not None and known.alive and self.nodes[name].serving
                gone += not reachable or self.nodes[name].epoch != epochs[name]
            lost = max(lost, gone)
        return lost

    def check_start(self, roster: Roster) -> None:
        """A new generation starts from the newest protected step or later, on the same line."""
        for name in roster.nodes:
            running = {t.generation for t in self.nodes[name].living()}
            assert not running, f"{name} gets ranks while its trainers of {running} live"
        assert roster.start.step or not self.protected_steps, "never afresh once a step was protected"
        if self.protected is None:
            return
        snapshot, _ = self.protected
        if roster.start.step >= snapshot.step:
            same = self.content(roster.start.generation, snapshot.step) == self.content(*_pair(snapshot))
            assert same, f"{roster.start} is another history than {snapshot}"
        else:
            assert self.losses() > roster.parity, f"{roster.start} is older than the protected {snapshot}"
            self.protected = None

    def accepted(self, node: SimNode, roster: Roster) -> None:
        assert self.rosters[roster.generation] == roster, "every roster that is sent was committed"

    def verified(self, node: SimNode, start: Snapshot) -> None:
        held = node.memory.holdings[start]
        assert held.sealed and set(held.ranks) == set(node.ranks), "a node resumes its own ranks' images"


def _pair(snapshot: Snapshot) -> tuple[int, int]:
    return snapshot.generation, snapshot.step
