"""The cut and the fence: how a rank's state becomes an image without stopping training.

`cut` copies what is volatile at once and hands what is quiescent to the copier;
`fence` waits for one optimizer's tensors.  On CUDA nothing here waits for the
device: volatile copies are enqueued on the current stream, quiescent ones on a side
stream behind an event, and a fence is a stream wait.

Trust is checked: an audited snapshot is copied whole at the cut, and compared byte
for byte with the live tensors at the fence.  So a tensor that changes anywhere
between cut and fence is caught whether or not the copier was fast.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ckptd.client.arena import Arena
from ckptd.client.copier import Copier
from ckptd.client.snapshot import CopyFunction, Group, PendingLoss, SideStreams, Snapshot, copy_all
from ckptd.client.state import Survey, Tree
from ckptd.client.tensors import spec_of
from ckptd.image import ImagePlan, Variable, roomy_capacity, write_variable

log = logging.getLogger("ckptd")

AUDITED_AT_FIRST = 3


@dataclass(frozen=True, slots=True)
class Origin:
    """Where images of this rank belong."""

    job: str
    rank: int
    world_size: int


def plan_of(survey: Survey, tree: Tree) -> ImagePlan:
    """Returns the plan of the surveyed tensors and of those in the tree, with room for the tree to grow."""
    specs = [spec_of(name, entry.tensor) for name, entry in survey.entries.items()]
    specs += [spec_of(name, tensor) for name, tensor in tree.tensors]
    return ImagePlan.build(specs, objects_capacity=roomy_capacity(len(tree.encoded)))


class Capture:
    """Captures one rank's state into its arena, one step after another.

    Args:
        done: called on the copier's thread with each snapshot that ended.
        audit: every how manieth snapshot is audited, after the first three; 0: none at all.
        eager: whether everything is copied at the cut.
    """

    def __init__(
        self, origin: Origin, copier: Copier, done: Callable[[Snapshot], None], *, audit: int, eager: bool
    ) -> None:
        # Tensors ever caught moving: volatile from then on.  Replaced, never changed in place,
        # since both threads look at it.
        self.moved: frozenset[str] = frozenset()
        self.copied_bytes = 0
        self.snapshots = 0
        self.audits = 0
        self.side = SideStreams()
        self.copy_behind: CopyFunction = copy_all  # a seam: tests make it slow
        self._origin = origin
        self._copier = copier
        self._done = done
        self._audit_every = audit
        self._eager = eager
        self._survey: Survey | None = None
        self._arena: Arena | None = None
        self._current: Snapshot | None = None
        self._classified_with = self.moved
        self._volatile: list[str] = []
        self._quiescent: dict[frozenset[int], list[str]] = {}

    def bind(self, survey: Survey, arena: Arena) -> None:
        """Takes over what to capture and where to."""
        self.fence_all()
        self._survey, self._arena = survey, arena
        if any(entry.tensor.is_cuda for entry in survey.entries.values()):
            arena.pin()
        self._classify()

    def unbind(self) -> None:
        """There is no arena any more."""
        self.fence_all()
        self._survey = self._arena = None

    @property
    def outstanding(self) -> Snapshot | None:
        """The newest snapshot, until it ended."""
        return self._current

    def classes(self) -> dict[str, list[str]]:
        """Returns the names of the stored tensors of modules and optimizers, by class."""
        quiescent = [name for names in self._quiescent.values() for name in names]
        return {"quiescent": quiescent, "volatile": list(self._volatile)}

    def cut(self, step: int, generation: int, slot: int, tree: Tree, loss: PendingLoss) -> Snapshot:
        """Starts a snapshot of the state as it is now.

        Raises:
            Outgrown: the tree no longer fits the plan; nothing was written.
        """
        survey, arena = self._survey, self._arena
        assert survey is not None and arena is not None
        if self._classified_with is not self.moved:
            self._classify()
        image = arena.image(slot)
        origin = self._origin
        variable = Variable(origin.job, generation, step, origin.rank, origin.world_size, tree.encoded)
        write_variable(arena.plan, image, variable)
        self.snapshots += 1
        audit = not self._eager and self._audit_due()
        self.audits += audit
        snapshot = Snapshot(step, slot, arena.plan.plan_hash, loss, audit=audit)
        volatile = [(arena.view(slot, name), survey.entries[name].tensor) for name in self._volatile]
        volatile += [(arena.view(slot, name), tensor) for name, tensor in tree.tensors]
        self._copy_now(snapshot, volatile)
        for owners, names in self._quiescent.items():
            sources = [survey.entries[name].tensor for name in names]
            snapshot.add(Group(owners, names, sources, [arena.view(slot, name) for name in names]))
        if audit or self._eager:
            for group in snapshot.groups:
                self._copy_now(snapshot, list(zip(group.targets, group.sources, strict=True)))
                group.copied.set()
        self.copied_bytes += arena.plan.image_bytes
        self._current = snapshot
        cuts = {} if audit or self._eager else self._cut_events(snapshot)
        self._copier.submit(lambda: self._copy_groups(snapshot, cuts))
        return snapshot

    def fence(self, optimizer: int) -> None:
        """Returns when this optimizer's tensors, and those of no optimizer, may change."""
        snapshot = self._current
        if snapshot is not None:
            self._fence(snapshot, [g for g in snapshot.groups if not g.owners or optimizer in g.owners])

    def fence_all(self) -> None:
        """Returns when everything may change."""
        snapshot = self._current
        if snapshot is not None:
            self._fence(snapshot, snapshot.groups)
            self._current = None

    def finish(self, deadline: float) -> bool:
        """Fences all, then waits until the newest snapshot ended; False when it has not by `deadline`."""
        snapshot = self._current
        self.fence_all()
        return snapshot is None or snapshot.finished.wait(max(0.0, deadline - time.monotonic()))

    def _fence(self, snapshot: Snapshot, groups: list[Group]) -> None:
        waited = snapshot.awaits_audit
        for group in groups:
            snapshot.fence(group)
        if waited and not snapshot.awaits_audit:
            self._note_moved(snapshot)
            self._copier.poke()

    def _classify(self) -> None:
        assert self._survey is not None
        self._volatile, self._quiescent = [], {}
        self._classified_with = self.moved
        for name, entry in self._survey.entries.items():
            if entry.quiescent and name not in self.moved:
                self._quiescent.setdefault(frozenset(entry.owners), []).append(name)
            else:
                self._volatile.append(name)

    def _audit_due(self) -> bool:
        if not self._audit_every:
            return False
        return self.snapshots <= AUDITED_AT_FIRST or self.snapshots % self._audit_every == 0

    def _copy_now(self, snapshot: Snapshot, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copies before anything that is called or enqueued later can change the sources."""
        copy_all([target for target, _ in pairs], [source for _, source in pairs])
        for device in {source.device for _, source in pairs if source.is_cuda}:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            snapshot.volatile_done.append(event)

    def _cut_events(self, snapshot: Snapshot) -> dict[torch.device, torch.cuda.Event]:
        """Marks the cut on every device's current stream."""
        devices = {source.device for group in snapshot.groups for source in group.sources if source.is_cuda}
        events = {}
        for device in devices:
            events[device] = torch.cuda.Event()
            events[device].record(torch.cuda.current_stream(device))
        return events

    def _copy_groups(self, snapshot: Snapshot, cuts: dict[torch.device, torch.cuda.Event]) -> None:
        """The copier's job: copies, then leaves the snapshot to be finished."""
        try:
            for device, cut in cuts.items():
                self.side.of(device).wait_event(cut)
            for group in snapshot.groups:
                if not group.copied.is_set():
                    self._copy_group(group)
                    group.copied.set()
        except (RuntimeError, ValueError) as error:  # the device failed, or memory is gone
            snapshot.void = f"the copy failed: {error}"
            log.exception("the snapshot of step %d could not be copied", snapshot.step)
        finally:
            # A fence must never wait for a copy that will not come.
            for group in snapshot.groups:
                group.copied.set()
        polled = bool(snapshot.volatile_done or cuts or snapshot.loss.on_device)
        self._copier.finish_later(lambda: self._attempt_to_finish(snapshot), polled=polled)

    def _copy_group(self, group: Group) -> None:
        on_host = [i for i, source in enumerate(group.sources) if not source.is_cuda]
        for device in {source.device for source in group.sources if source.is_cuda}:
            chosen = [i for i, source in enumerate(group.sources) if source.device == device]
            with torch.cuda.stream(self.side.of(device)):
                self.copy_behind([group.targets[i] for i in chosen], [group.sources[i] for i in chosen])
                event = torch.cuda.Event()
                event.record()
            group.device_done[device] = event
        self.copy_behind([group.targets[i] for i in on_host], [group.sources[i] for i in on_host])

    def _attempt_to_finish(self, snapshot: Snapshot) -> bool:
        if not snapshot.attempt_to_finish():
            return False
        self._note_moved(snapshot)
        self._done(snapshot)
        snapshot.finished.set()
        return True

    def _note_moved(self, snapshot: Snapshot) -> None:
        """Makes tensors volatile that an audit found moving; takes effect at the next cut."""
        new = set(snapshot.moved) - self.moved
        for name in sorted(new):
            log.warning("%s changed between the cut and its fence: it is copied at the cut from now on", name)
        if new:
            self.moved = self.moved | new
