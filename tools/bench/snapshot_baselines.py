"""What a snapshot is compared with: copying the state, and moving it over loopback TCP."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ckptd.memory.bulk import BLOCK_BYTES

_DEADLINE_S = 60.0

Bytes = NDArray[np.uint8]


def measure(tensors: Sequence[Tensor], repeat: int) -> dict[str, Any]:
    """Seconds and CPU seconds of this rank, by baseline; "together" with the other rank, and "alone".

    A transfer counts the CPU of this rank only, which sends its state and, together, receives
    the other's; the CPU of both ends is the sum over the ranks.

    Args:
        tensors: the state of this rank; all on the CPU.
        repeat: how often each is done together (alone: half as often), after one time for warming up.
    """
    sources = [_bytes_of(tensor) for tensor in tensors]
    size = sum(source.size for source in sources)
    flat, target = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    for source, place in zip(sources, _slices(flat, sources), strict=True):
        np.copyto(place, source)
    places = _slices(target, sources)

    def by_tensor() -> None:
        for source, place in zip(sources, places, strict=True):
            np.copyto(place, source)

    results = {
        "memcpy_flat": _together_and_alone(lambda: np.copyto(target, flat), repeat),
        "memcpy_by_tensor": _together_and_alone(by_tensor, repeat),
    }
    with _Transfer(flat, target) as transfer:
        results["transfer"] = {
            "together": _timed(transfer.both_ways, repeat, [0, 1]),
            "alone": _timed(transfer.from_rank_0, (repeat + 1) // 2, [0, 1]),
        }
    return results


def _bytes_of(tensor: Tensor) -> Bytes:
    bits: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return bits


def _slices(whole: Bytes, like: Sequence[Bytes]) -> list[Bytes]:
    places, at = [], 0
    for part in like:
        places.append(whole[at : at + part.size])
        at += part.size
    return places


def _together_and_alone(action: Callable[[], object], repeat: int) -> dict[str, Any]:
    return {"together": _timed(action, repeat, [0, 1]), "alone": _timed(action, (repeat + 1) // 2, [0])}


def _timed(action: Callable[[], object], repeat: int, ranks: Sequence[int]) -> dict[str, list[float]]:
    """All ranks meet before and after every repeat; those in `ranks` do it."""
    seconds, cpu = [], []
    for _ in range(repeat + 1):
        dist.barrier()
        began, began_cpu = time.perf_counter(), time.process_time()
        if dist.get_rank() in ranks:
            action()
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    dist.barrier()
    return {"seconds": seconds[1:], "cpu_s": cpu[1:]}


class _Transfer:
    """A TCP connection each way between ranks 0 and 1, blocks as large as ckptd's."""

    def __init__(self, source: Bytes, target: Bytes) -> None:
        self._source, self._target = memoryview(source), memoryview(target)
        self._rank = dist.get_rank()
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(_DEADLINE_S)
        mine = torch.tensor([listener.getsockname()[1], source.size])
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        port, self._incoming = (int(number) for number in both[1 - self._rank])
        self._out = socket.create_connection(("127.0.0.1", port), timeout=_DEADLINE_S)
        self._in, _ = listener.accept()
        listener.close()
        for sock in (self._out, self._in):
            sock.setblocking(True)

    def __enter__(self) -> _Transfer:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        self._in.close()

    def both_ways(self) -> None:
        """Done when this rank's bytes have arrived, and the other's here."""
        receiver = threading.Thread(target=self._receive)
        receiver.start()
        self._send()
        receiver.join()

    def from_rank_0(self) -> None:
        self._send() if self._rank == 0 else self._receive()

    def _send(self) -> None:
        for at in range(0, len(self._source), BLOCK_BYTES):
            self._out.sendall(self._source[at : at + BLOCK_BYTES])
        if self._out.recv(1) != b"k":
            raise RuntimeError("the transfer was not received")

    def _receive(self) -> None:
        """The ranks' states differ by a little: what does not fit lands at the front."""
        left = self._incoming
        while left:
            at = (self._incoming - left) % max(1, len(self._target) - BLOCK_BYTES)
            got = self._in.recv_into(
                self._target[at:], min(left, BLOCK_BYTES, len(self._target) - at), socket.MSG_WAITALL
            )
            if not got:
                raise RuntimeError("the transfer ended early")
            left -= got
        self._in.sendall(b"k")
