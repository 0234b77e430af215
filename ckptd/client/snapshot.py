"""One snapshot under way: groups of tensors that are copied, fenced and audited together."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass

import torch

from ckptd.client.copying import Piece, pieces_of
from ckptd.client.device import DeviceEvent, PendingLoss
from ckptd.client.tensors import same_bytes

log = logging.getLogger("ckptd")


@dataclass(slots=True)
class Part:
    """Tensors on one device, and their places in one slot."""

    device: torch.device
    names: list[str]
    sources: list[torch.Tensor]
    targets: list[torch.Tensor]
    _pieces: list[Piece] | None = None

    @property
    def on_host(self) -> bool:
        return self.device.type == "cpu"

    def pieces(self) -> list[Piece]:
        """Returns what copies a part on the host; made once, used for every snapshot in this slot."""
        if self._pieces is None:
            self._pieces = pieces_of(self.targets, self.sources)
        return self._pieces


class Group:
    """Tensors of the same owners: waited for together.

    Those on the host are copied in pieces by whoever has time: the copier, and a fence
    that would wait for it.  So no fence depends on when the copier gets a processor.
    """

    def __init__(self, owners: frozenset[int], parts: list[Part]) -> None:
        self.owners = owners  # optimizers; empty: nobody's, waited for by every fence
        self.parts = parts
        self.devices = [part for part in parts if not part.on_host]
        self.copied = threading.Event()  # on the host; on a device: enqueued
        self.device_done: list[DeviceEvent] = []
        self.audited = False
        self.failure = ""  # why it was not copied
        self._left = deque(piece for part in parts if part.on_host for piece in part.pieces())
        self._lock = threading.Lock()
        # What must end before all is copied: every piece, and the enqueuing of the devices' parts.
        self._unfinished = len(self._left) + bool(self.devices)
        if not self._unfinished:
            self.copied.set()

    def copy_host(self) -> bool:
        """Copies what nobody has begun to copy; returns whether there was anything."""
        took = False
        while self._left:
            try:
                piece = self._left.popleft()
            except IndexError:  # another thread took the last one
                break
            took = True
            try:
                piece()
            except (RuntimeError, ValueError) as error:  # memory is gone
                self.fail(error)
            self.one_less()
        return took

    def one_less(self) -> None:
        """Called when something ended that had to end before all is copied."""
        with self._lock:
            self._unfinished -= 1
            if self._unfinished == 0:
                self.copied.set()

    def fail(self, error: Exception) -> None:
        """Gives the copy up: no fence may wait for one that will not come."""
        log.error("a snapshot could not be copied: %s", error, exc_info=error)
        self.failure = self.failure or f"the copy failed: {error}"
        self._left.clear()
        self.copied.set()

    def wait(self) -> bool:
        """Returns when the tensors may change: on a device, changes are ordered behind the copy.

        Copies what is left itself, and returns whether there was anything.
        """
        took = self.copy_host()
        # For the piece that the copier is at, and for what it has to enqueue.
        self.copied.wait()
        for event in self.device_done:
            event.hold_back()
        return took


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

    def fence(self, group: Group) -> bool:
        """Waits for one group, and audits it if this snapshot is to be; whether it copied itself."""
        took = group.wait()
        if self.audit and not group.audited:
            group.audited = True
            for part in group.parts:
                self._compare(part)
            self._unaudited -= 1
        return took

    @property
    def awaits_audit(self) -> bool:
        return self._unaudited > 0

    def attempt_to_finish(self) -> bool:
        """Whether all bytes are in place and judged; then `void`, `moved` and `not_finite` are final."""
        if self._unaudited > 0 or not all(group.copied.is_set() for group in self.groups):
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
        failures = [group.failure for group in self.groups if group.failure]
        if self.not_finite:
            self.void = "the loss is not finite"
        elif failures:
            self.void = failures[0]
        elif self.moved:
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
