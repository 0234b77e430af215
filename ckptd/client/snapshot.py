"""One snapshot under way: groups of tensors that are copied, fenced and audited together."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ckptd.client.tensors import same_bytes

log = logging.getLogger("ckptd")

CopyFunction = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]


# Devices whose copies can be ordered behind what runs on them; all others are waited for.
ORDERED_DEVICES = frozenset({"cpu", "cuda"})


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copies tensors pairwise; from a CUDA device into pinned memory without waiting for it."""
    if targets:
        ordered = all(source.device.type in ORDERED_DEVICES for source in sources)
        torch._foreach_copy_(list(targets), list(sources), non_blocking=ordered)


class PendingLoss:
    """A loss on its way to the host; a CUDA loss is not waited for."""

    def __init__(self, loss: float | torch.Tensor | None, side: SideStreams) -> None:
        self._event: torch.cuda.Event | None = None
        if isinstance(loss, torch.Tensor):
            loss = loss.detach()
            if loss.is_cuda:
                self._host = torch.empty((), dtype=torch.float64, pin_memory=True)
                with torch.cuda.stream(side.behind_now(loss.device)):
                    # Converted on the device: only the copy crosses, and it is asynchronous.
                    self._host.copy_(loss.to(torch.float64), non_blocking=True)
                    self._event = torch.cuda.Event()
                    self._event.record()
                    loss.record_stream(torch.cuda.current_stream())
                return
            loss = float(loss)
        self._host = torch.tensor(0.0 if loss is None else float(loss), dtype=torch.float64)

    @property
    def on_device(self) -> bool:
        return self._event is not None

    def judge(self) -> bool | None:
        """Returns whether the loss is finite, or None while it is not here."""
        if self._event is not None and not self._event.query():
            return None
        return math.isfinite(float(self._host))


class SideStreams:
    """One stream per CUDA device for everything that is copied behind training."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, device: torch.device) -> torch.cuda.Stream:
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        return stream

    def behind_now(self, device: torch.device) -> torch.cuda.Stream:
        """Returns the side stream, ordered behind everything enqueued so far on the current one."""
        stream = self.of(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        return stream


@dataclass(slots=True)
class Group:
    """Tensors of the same owners: copied one after another, waited for together."""

    owners: frozenset[int]  # optimizers; empty: nobody's, waited for by every fence
    names: list[str]
    sources: list[torch.Tensor]
    targets: list[torch.Tensor]
    copied: threading.Event = field(default_factory=threading.Event)  # on the host; on a device: enqueued
    device_done: dict[torch.device, torch.cuda.Event] = field(default_factory=dict)
    audited: bool = False

    def wait(self) -> None:
        """Returns when the tensors may change: on a device, changes are ordered behind the copy."""
        # The copier always sets this, also when it fails.
        self.copied.wait()
        for device, event in self.device_done.items():
            torch.cuda.current_stream(device).wait_event(event)


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
        self.volatile_done: list[torch.cuda.Event] = []
        self.void = ""  # why it is void
        self.not_finite = False
        self.moved: list[str] = []
        self.finished = threading.Event()
        self._verdicts: list[tuple[list[str], torch.Tensor, torch.cuda.Event]] = []
        self._unaudited = 0

    def add(self, group: Group) -> None:
        self.groups.append(group)
        self._unaudited += self.audit

    def fence(self, group: Group) -> None:
        """Waits for one group, and audits it if this snapshot is to be."""
        group.wait()
        if self.audit and not group.audited:
            group.audited = True
            self._compare(group)
            self._unaudited -= 1

    @property
    def awaits_audit(self) -> bool:
        return self._unaudited > 0

    def attempt_to_finish(self) -> bool:
        """Whether all bytes are in place and judged; then `void`, `moved` and `not_finite` are final."""
        if self._unaudited > 0:
            return False
        events = [*self.volatile_done, *(event for group in self.groups for event in group.device_done.values())]
        events += [event for _, _, event in self._verdicts]
        if not all(event.query() for event in events):
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

    def _compare(self, group: Group) -> None:
        """Compares with the live bytes; on a device without waiting for the answer."""
        by_device: dict[torch.device, list[int]] = {}
        for index, source in enumerate(group.sources):
            by_device.setdefault(source.device, []).append(index)
        for device, indices in by_device.items():
            same = torch.stack([same_bytes(group.targets[i], group.sources[i]) for i in indices])
            names = [group.names[i] for i in indices]
            if device.type != "cuda":
                self._judge(names, same)
                continue
            host = torch.empty(same.shape, dtype=torch.bool, pin_memory=True)
            host.copy_(same, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._verdicts.append((names, host, event))

    def _judge(self, names: list[str], same: torch.Tensor) -> None:
        self.moved += [name for name, kept in zip(names, same.tolist(), strict=True) if not kept]
