"""One snapshot under way: groups of tensors that are copied, fenced and audited together."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ckptd.client.device import DeviceEvent, PendingLoss
from ckptd.client.tensors import same_bytes

# From here on a tensor is copied by one memmove instead of together with others by torch.
_LARGE_BYTES = 64 << 10


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


class Move(NamedTuple):
    """Bytes that lie together at both ends."""

    target: int  # address
    source: int  # address
    nbytes: int


class PartCopy:
    """How a part is copied behind the fence; made once, used for every snapshot in this slot.

    On the host large tensors are moved as bytes: torch would split each among as many OpenMP
    threads as training uses, a second team of them beside training's own.  The addresses hold
    as long as the tensors, which this keeps.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self._moves: list[Move] = []
        self._targets: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        for target, source in zip(part.targets, part.sources, strict=True):
            if _moves_as_bytes(target, source):
                self._moves.append(Move(target.data_ptr(), source.data_ptr(), target.nbytes))
            else:
                self._targets.append(target)
                self._sources.append(source)

    def run(self) -> None:
        """Copies; from a CUDA device without waiting for it."""
        for move in self._moves:
            ctypes.memmove(*move)  # lets go of the interpreter lock
        copy_all(self._targets, self._sources)


def _moves_as_bytes(target: torch.Tensor, source: torch.Tensor) -> bool:
    host = source.device.type == "cpu" and source.layout is torch.strided
    return (
        host
        and source.dtype == target.dtype
        and source.nbytes == target.nbytes >= _LARGE_BYTES
        and source.is_contiguous()
        and target.is_contiguous()
        and not source.is_neg()
        and not source.is_conj()
    )


@dataclass(slots=True)
class Group:
    """Tensors of the same owners: copied one after another, waited for together."""

    owners: frozenset[int]  # optimizers; empty: nobody's, waited for by every fence
    copies: list[PartCopy]
    copied: threading.Event = field(default_factory=threading.Event)  # on the host; on a device: enqueued
    device_done: list[DeviceEvent] = field(default_factory=list)
    audited: bool = False

    @property
    def parts(self) -> list[Part]:
        return [copy.part for copy in self.copies]

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
