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
from dataclasses import dataclass, field

import torch

from ckptd.client.arena import Arena
from ckptd.client.copier import Copier
from ckptd.client.copying import copy_all
from ckptd.client.device import ORDERED_DEVICES, DeviceEvent, PendingLoss, SideStreams
from ckptd.client.snapshot import Group, Part, Snapshot
from ckptd.client.state import Survey, Tree
from ckptd.client.tensors import spec_of
from ckptd.failpoints import failpoint
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


@dataclass(slots=True)
class _Binding:
    """A survey's tensors sorted for copying, with their places in every slot.

    Made when tensors, arena or classes change, so that a cut only picks lists.
    """

    survey: Survey
    arena: Arena
    moved: frozenset[str]
    volatile: list[list[Part]] = field(init=False)  # by slot
    quiescent: list[list[tuple[frozenset[int], list[Part]]]] = field(init=False)  # by slot

    def __post_init__(self) -> None:
        volatile: dict[torch.device, list[str]] = {}
        quiescent: dict[frozenset[int], dict[torch.device, list[str]]] = {}
        for name, entry in self.survey.entries.items():
            at_the_cut = not entry.quiescent or name in self.moved
            group = volatile if at_the_cut else quiescent.setdefault(frozenset(entry.owners), {})
            group.setdefault(entry.tensor.device, []).append(name)
        slots = range(self.arena.slots)
        self.volatile = [self._parts(slot, volatile) for slot in slots]
        self.quiescent = [
            [(owners, self._parts(slot, g)) for owners, g in quiescent.items()] for slot in slots
        ]

    def _parts(self, slot: int, by_device: dict[torch.device, list[str]]) -> list[Part]:
        entries, arena = self.survey.entries, self.arena
        return [
            Part(device, names, [entries[n].tensor for n in names], [arena.view(slot, n) for n in names])
            for device, names in by_device.items()
        ]


def _parts_of(tree: Tree, arena: Arena, slot: int) -> list[Part]:
    parts: dict[torch.device, Part] = {}
    for name, tensor in tree.tensors:
        part = parts.setdefault(tensor.device, Part(tensor.device, [], [], []))
        part.names.append(name)
        part.sources.append(tensor)
        part.targets.append(arena.view(slot, name))
    return list(parts.values())


class Capture:
    """Captures one rank's state into its arena, one step after another.

    Args:
        done: called on the copier's thread with each snapshot that ended.
        audit: every how manieth snapshot is audited, and the first three; 0: none at all.
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
        self.behind: Callable[[], None] = lambda: None  # the first thing that is done behind a cut
        self._origin = origin
        self._copier = copier
        self._done = done
        self._audit_every = audit
        self._eager = eager
        self._binding: _Binding | None = None
        self._current: Snapshot | None = None

    def bind(self, survey: Survey, arena: Arena) -> None:
        """Takes over what to capture and where to."""
        self.fence_all()
        if any(entry.tensor.is_cuda for entry in survey.entries.values()):
            arena.pin()
        self._binding = _Binding(survey, arena, self.moved)

    def unbind(self) -> None:
        """There is no arena any more."""
        self.fence_all()
        self._binding = None

    def cut(self, step: int, generation: int, slot: int, tree: Tree, loss: PendingLoss) -> Snapshot:
        """Starts a snapshot of the state as it is now.

        Raises:
            Outgrown: the tree no longer fits the plan; nothing was written.
        """
        binding = self._binding
        assert binding is not None
        if binding.moved is not self.moved:
            binding = self._binding = _Binding(binding.survey, binding.arena, self.moved)
        arena, origin = binding.arena, self._origin
        variable = Variable(origin.job, generation, step, origin.rank, origin.world_size, tree.encoded)
        write_variable(arena.plan, arena.image(slot), variable)
        self.snapshots += 1
        audit = not self._eager and self._audit_due()
        self.audits += audit
        snapshot = Snapshot(step, slot, arena.plan.plan_hash, loss, audit=audit)
        for part in binding.volatile[slot]:
            self._copy_now(snapshot, part)
        for part in _parts_of(tree, arena, slot):
            self._copy_now(snapshot, part)
        failpoint("trainer.volatile")
        cuts: dict[torch.device, DeviceEvent] = {}
        for owners, parts in binding.quiescent[slot]:
            group = Group(owners, parts)
            snapshot.add(group)
            if audit or self._eager:
                self._copy_group_now(snapshot, group)
                continue
            for part in group.devices:
                if part.device not in cuts:
                    cuts[part.device] = DeviceEvent(part.device)
        self.copied_bytes += arena.plan.image_bytes
        self._current = snapshot
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
        took = False
        for group in groups:
            took |= snapshot.fence(group)
        audited = waited and not snapshot.awaits_audit
        if audited:
            self._note_moved(snapshot)
        if audited or took:
            self._copier.poke()  # the snapshot may be complete
        failpoint("trainer.fenced")

    def _audit_due(self) -> bool:
        if not self._audit_every:
            return False
        return self.snapshots <= AUDITED_AT_FIRST or self.snapshots % self._audit_every == 0

    def _copy_now(self, snapshot: Snapshot, part: Part) -> None:
        """Copies before anything that is called or enqueued later can change the sources."""
        if part.device.type not in ORDERED_DEVICES:
            for target, source in zip(part.targets, part.sources, strict=True):
                target.copy_(source)
            return
        copy_all(part.targets, part.sources)
        if part.device.type == "cuda":
            snapshot.cut_done.append(DeviceEvent(part.device))

    def _copy_group_now(self, snapshot: Snapshot, group: Group) -> None:
        group.copy_host()
        for part in group.devices:
            self._copy_now(snapshot, part)
        if group.devices:
            group.one_less()

    def _copy_groups(self, snapshot: Snapshot, cuts: dict[torch.device, DeviceEvent]) -> None:
        """The copier's job: copies, then leaves the snapshot to be finished."""
        self.behind()
        # Devices first: their copies run while the host's are made.
        waiting = [group for group in snapshot.groups if not group.copied.is_set()]
        self._enqueue([group for group in waiting if group.devices], cuts)
        for group in waiting:
            group.copy_host()
            failpoint("trainer.copying")
        polled = bool(snapshot.cut_done or cuts or snapshot.loss.on_device)
        self._copier.finish_later(lambda: self._attempt_to_finish(snapshot), polled=polled)

    def _enqueue(self, groups: list[Group], cuts: dict[torch.device, DeviceEvent]) -> None:
        """Copies the groups' tensors from their devices, on the side streams behind the cut."""
        try:
            for device, cut in cuts.items():
                cut.hold_back(self.side.of(device))
            for group in groups:
                for part in group.devices:
                    stream = self.side.of(part.device)
                    with torch.cuda.stream(stream):
                        copy_all(part.targets, part.sources)
                    group.device_done.append(DeviceEvent(part.device, stream))
                group.one_less()
        except (RuntimeError, ValueError) as error:  # the device failed, or memory is gone
            for group in groups:
                if not group.copied.is_set():
                    group.fail(error)

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
