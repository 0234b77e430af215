"""One snapshot under way: groups of tensors that are copied, fenced and audited together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ckptd.client.device import DeviceEvent, PendingLoss
from ckptd.client.tensors import same_bytes

CopyFunction = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copies tensors pairwise; from a CUDA device into pinned memory without waiting for it."""
    if targets:
        torch._foreach_copy_(tuple(targets), tuple(sources), non_blocking=True)


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors on one device, and their places in one slot."""

    device: torch.device
    names: list[str]
    sources: list[torch.Tensor]
    targets: list[torch.Tensor]


@dataclass(slots=True)
class Group:
    """Tensors of the same owners: copied one after another, waited for together."""

    owners: frozenset[int]  # optimizers; empty: nobody's, waited for by every fence
    parts: list[Part]
    copied: threading.Event = field(default_factory=threading.Event)  # on the host; on a device: enqueued
    device_done: list[DeviceEvent] = field(default_factory=list)
    audited: bool = False

    def wait(self) -> None:
        """Returns when the tensors may change: on a device, changes are ordered behind the copy."""
        # The copier always sets this, also when it fails.
        self.copied.wait()
        for event in self.device_done:
            event.hold_back()


class Snapshot:
    """The state of `step`, on its way into `slot`.

    It ends once: captured, or void with a reason.  `attempt_to_finish` runs on the
    copier's thread, all else on the trainer's.
    """

    def __init__(self, step: int, slot: int, plan_hash: bytes, loss: PendingLoss, *, audit: bool) -> None:
        self.step = step
        self.slot = slot
        self.plan_hash = plan_hash
        self.loss = loss
        self.audit = audit
        self.groups: list[Group] = []
        self.cut_done: list[DeviceEvent] = []  # of what was copied at the cut
        self.void = ""  # why it is void
        self.not_finite = False
        self.moved: list[str] = []
        self.finished = threading.Event()
        self._verdicts: list[tuple[list[str], torch.Tensor, DeviceEvent]] = []
        self._unaudited = 0

    def add(self, group: Group) -> None:
        self.groups.append(group)
        self._unaudited += self.audit

    def fence(self, group: Group) -> None:
        """Waits for one group, and audits it if this snapshot is to be."""
        group.wait()
        if self.audit and not group.audited:
            group.audited = True
            for part in group.parts:
                self._compare(part)
            self._unaudited -= 1

    @property
    def awaits_audit(self) -> bool:
        return self._unaudited > 0

    def attempt_to_finish(self) -> bool:
        """Whether all bytes are in place and judged; then `void`, `moved` and `not_finite` are final."""
        if self._unaudited > 0:
            return False
        events = [*self.cut_done, *(event for group in self.groups for event in group.device_done)]
        events += [event for _, _, event in self._verdicts]
        if not all(event.reached() for event in events):
            return False
        finite = self.loss.judge()
        if finite is None:
            return False
        self.not_finite = not finite
        while self._verdicts:
            self._judge(*self._verdicts.pop()[:2])
        if self.not_finite:
            self.void = "the loss is not finite"
        elif self.moved and not self.void:
            self.void = f"changed between the cut and the fence: {', '.join(self.moved[:3])}"
        return True

    def _compare(self, part: Part) -> None:
        """Compares with the live bytes; on a device without waiting for the answer."""
        pairs = zip(part.targets, part.sources, strict=True)
        same = torch.stack([same_bytes(target, source) for target, source in pairs])
        if part.device.type != "cuda":
            self._judge(part.names, same)
            return
        host = torch.empty(same.shape, dtype=torch.bool, pin_memory=True)
        host.copy_(same, non_blocking=True)
        self._verdicts.append((part.names, host, DeviceEvent(part.device)))

    def _judge(self, names: list[str], same: torch.Tensor) -> None:
        self.moved += [name for name, kept in zip(names, same.tolist(), strict=True) if not kept]
