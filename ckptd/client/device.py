"""CUDA's part in one place: events, side streams, pinned memory, losses that are still on their way.

Nothing here waits for a device.
"""

from __future__ import annotations

import logging
import math

import torch

from ckptd.errors import InvalidRequest

log = logging.getLogger("ckptd")

# Devices whose copies can be ordered behind what runs on them; copies from all others are waited for.
ORDERED_DEVICES = frozenset({"cpu", "cuda"})


class DeviceEvent:
    """A point in a device's current stream (or in `stream`) at the time of its making."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream or torch.cuda.current_stream(device))

    def reached(self) -> bool:
        """Whether the device has come here."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def hold_back(self, stream: torch.cuda.Stream | None = None) -> None:
        """Orders what is enqueued later on the current stream (or on `stream`) behind this point."""
        (stream or torch.cuda.current_stream(self._device)).wait_event(self._event)


class SideStreams:
    """One stream per CUDA device for everything that is copied behind training."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, device: torch.device) -> torch.cuda.Stream:
        stream = self._streams.get(device)
        if stream is None:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._streams[device] = stream
        return stream


class PendingLoss:
    """A loss on its way to the host; a CUDA loss is copied on the side stream."""

    def __init__(self, loss: float | torch.Tensor | None, side: SideStreams) -> None:
        """Where there is no loss, a finite one is assumed.

        Raises:
            InvalidRequest: a tensor of other than one element.
        """
        if isinstance(loss, torch.Tensor) and loss.numel() != 1:
            raise InvalidRequest(
                f"a loss is one number, found shape {list(loss.shape)}", next="pass loss.mean()"
            )
        self._event: DeviceEvent | None = None
        self._host: float | torch.Tensor
        if isinstance(loss, torch.Tensor):
            loss = loss.detach()
        if isinstance(loss, torch.Tensor) and loss.is_cuda:
            self._host = self._copy(loss, side)
        else:
            self._host = 0.0 if loss is None else float(loss)

    @property
    def on_device(self) -> bool:
        """Whether the loss comes from a device, so that its arrival is announced by nobody."""
        return self._event is not None

    def judge(self) -> bool | None:
        """Returns whether the loss is finite, or None while it is not here."""
        if self._event is not None and not self._event.reached():
            return None
        return math.isfinite(float(self._host))

    def _copy(self, loss: torch.Tensor, side: SideStreams) -> torch.Tensor:
        host = torch.empty(loss.shape, dtype=loss.dtype, pin_memory=True)
        stream = side.of(loss.device)
        DeviceEvent(loss.device).hold_back(stream)
        with torch.cuda.stream(stream):
            host.copy_(loss, non_blocking=True)
            # The allocator must not hand the loss's memory out before the copy has passed.
            loss.record_stream(stream)
        self._event = DeviceEvent(loss.device, stream)
        return host


def cuda_in_use() -> bool:
    """Whether this process has used CUDA already; asking does not initialize it."""
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def register_pinned(memory: torch.Tensor) -> bool:
    """Registers a host tensor's bytes with CUDA, so that devices copy straight into them."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if code:
        log.warning("the arena could not be pinned (CUDA error %d): copies from the device are slower", code)
    return code == 0


def unregister_pinned(memory: torch.Tensor) -> None:
    """Undoes `register_pinned`; nothing may be copying into these bytes."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
